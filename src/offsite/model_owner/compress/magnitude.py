"""Magnitude pruning: the smallest weights of each matrix become zero (Han et al., arXiv 1506.02626). Torch-free.

It needs no calibration data, so it runs when the weights are stored, after healing and after MLPs are made narrower.
"""

from offsite.model_owner.compress.smallest_weights import Array, without_smallest


def prune_stored(weight: Array, share: float) -> Array:
    """Set the floor(share * size) smallest weights of a matrix to zero.

    Of weights with equal magnitude, the earlier become zero first.
    """
    return without_smallest(weight, share)
