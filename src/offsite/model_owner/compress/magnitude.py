"""Magnitude pruning: the smallest weights of each matrix become zero (Han et al., arXiv 1506.02626). Torch-free.

It looks at nothing but the weights, so it comes when they are stored, behind healing and a narrower feed-forward part.
"""

from offsite.model_owner.compress.zeros import Array, without_smallest


def prune_stored(weight: Array, share: float) -> Array:
    """A matrix without its smallest weights: exactly floor(share * size) become zero, of equals the earlier."""
    return without_smallest(weight, share)
