"""Uniform selection, the rule of the paper (offsite-tuning, arXiv 2302.04870, section 3.3)."""

from collections.abc import Sequence

from offsite.model_owner.select.selection_protocol import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks, evenly spaced over the middle."""
    return uniform(selection.middle, selection.keep)


def uniform(middle: Sequence[int], keep: int) -> tuple[int, ...]:
    """The base indices of `keep` evenly spaced blocks, including the first and the last; keep = 1 gives the first."""
    if keep == 1:
        return (middle[0],)
    return tuple(middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep))
