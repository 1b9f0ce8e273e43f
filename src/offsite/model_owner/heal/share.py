"""Sharing: every dropped block's place is taken by the nearest kept one, stored once (CRaSh, arXiv 2310.15477)."""

from collections.abc import Sequence


def fill_places(middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    """For each block of the middle the kept one that runs in its place; of two as near, the earlier."""
    return tuple(min(kept, key=lambda one: (abs(one - index), one)) for index in middle)
