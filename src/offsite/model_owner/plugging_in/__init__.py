"""Plugging in: makes a plug-in, which is the base model with the returned adapter, from a verified return."""
