"""Contiguous drop: the blocks that go are neighbours, so that one gap opens where spread drops would open many."""

from collections.abc import Sequence

from offsite.errors import UsageError
from offsite.model_owner.select.selection import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """The blocks before and behind the piece that goes.

    Raises:
        UsageError: the piece does not lie in the middle.
    """
    return contiguous(selection.middle, selection.keep, selection.spec.select.drop_from)


def contiguous(middle: Sequence[int], keep: int, drop_from: int | None = None) -> tuple[int, ...]:
    """The blocks that stay when one piece goes.

    Args:
        middle: base indices of the middle, in order.
        keep: how many of them stay.
        drop_from: base index of the first block that goes; None leaves as many before the piece as behind it, one
            more before where they are odd.

    Raises:
        UsageError: the piece does not lie in the middle.
    """
    dropped = len(middle) - keep
    before = (keep + 1) // 2 if drop_from is None else drop_from - middle[0]
    if not 0 <= before <= keep:
        raise UsageError(
            f"cannot drop {dropped} blocks from block {drop_from} on",
            reasons=[f"the middle is blocks {middle[0]} to {middle[-1]}, and {keep} of it stay"],
            next_step=f"choose --drop-from between {middle[0]} and {middle[0] + keep}",
        )
    return (*middle[:before], *middle[before + dropped :])
