"""Sharing: in place of each dropped block runs the kept block with the closest index, which is stored only once.

CRaSh, arXiv 2310.15477."""

from collections.abc import Sequence


def fill_places(middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """For each block of the middle, the base index of the kept block that runs there: the one with the closest index.

    Of two equally close blocks, it is the earlier. `middle` and `kept` are base indices in ascending order.
    """
    return tuple(min(kept, key=lambda one: (abs(one - index), one)) for index in middle)
