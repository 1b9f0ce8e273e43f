"""How the emulator makes up for what was dropped or compressed, one method a file."""
