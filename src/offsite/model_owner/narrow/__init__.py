"""Narrower blocks: which attention heads and MLP neurons stay; one way to choose them per file."""
