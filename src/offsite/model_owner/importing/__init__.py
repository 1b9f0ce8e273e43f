"""Importing: converts checkpoints of other formats to a base folder; each format has its own file."""
