"""Import: convert checkpoints of other formats to a base folder; one format per file."""
