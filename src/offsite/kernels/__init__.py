"""The seam for speed: what makes a model fast on a device. Nothing outside imports below this package."""
