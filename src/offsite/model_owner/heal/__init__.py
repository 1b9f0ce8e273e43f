"""Healing: changes the emulator to compensate for dropped and compressed blocks; each method has its own file."""
