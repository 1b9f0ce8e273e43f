"""Import: checkpoints of other formats become a base folder, one source a file."""
