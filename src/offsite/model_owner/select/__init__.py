"""Which blocks of the middle the emulator keeps, one rule a file."""
