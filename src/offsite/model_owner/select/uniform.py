"""Uniform selection, the paper's (offsite-tuning, arXiv 2302.04870, section 3.3)."""

from collections.abc import Sequence

from offsite.model_owner.select.selection import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """Evenly spread blocks of the middle."""
    return uniform(selection.middle, selection.keep)


def uniform(middle: Sequence[int], keep: int) -> tuple[int, ...]:
    """Evenly spread blocks, the first and the last among them; keep = 1 takes the first."""
    if keep == 1:
        return (middle[0],)
    return tuple(middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep))
