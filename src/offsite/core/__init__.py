"""What a model is, whoever holds it."""
