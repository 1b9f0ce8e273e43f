"""The two demos, and the models and data that they fetch or make."""
