"""Rows and pictures: reading, chat templates, tokens and labels, batches."""
