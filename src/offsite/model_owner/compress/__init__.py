"""Compresses the emulator's blocks; each method has its own file."""
