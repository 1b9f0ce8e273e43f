"""Reads rows of text and pictures, and turns them into tokens with labels, pixels, and batches."""
