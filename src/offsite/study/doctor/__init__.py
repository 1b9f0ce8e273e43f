"""Examines an installation: packages, machine, home, and the whole chain on a tiny random model."""
