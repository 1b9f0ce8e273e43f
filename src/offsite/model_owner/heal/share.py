"""Sharing: the nearest kept block runs in place of each dropped one, but is stored once (CRaSh, arXiv 2310.15477)."""

from collections.abc import Sequence


def fill_places(middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """For each block of the middle, the base index of the nearest kept block; of two equally near blocks, the earlier.

    `middle` and `kept` are base indices.
    """
    return tuple(min(kept, key=lambda one: (abs(one - index), one)) for index in middle)
