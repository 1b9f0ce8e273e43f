"""Compressing the emulator's blocks: one method per file."""
