"""Plugging in: from a verified return to a plug-in of the base model."""
