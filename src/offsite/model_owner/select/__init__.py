"""Chooses which blocks of the middle the emulator keeps; one selection rule per file."""
