"""The owner's stages: import, pack, intake, plug in."""
