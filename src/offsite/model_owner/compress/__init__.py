"""How the middle becomes an emulator: selection rules and what heals the gaps; one compressor a file."""
