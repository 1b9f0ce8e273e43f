"""Healing: how the emulator compensates for dropped and compressed blocks; one method per file."""
