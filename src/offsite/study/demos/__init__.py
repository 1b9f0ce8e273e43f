"""The language demo and the vision demo, with the models and data sets that they download or make."""
