"""Chooses which of the base's middle blocks the emulator keeps; each selection rule has its own file."""
