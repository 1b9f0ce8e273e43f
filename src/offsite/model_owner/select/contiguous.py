"""Contiguous selection: drops one run of consecutive blocks, so the emulator has one gap instead of many."""

from collections.abc import Sequence

from offsite.errors import UsageError
from offsite.model_owner.select.selection_protocol import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks: those before and after the dropped run.

    Raises:
        UsageError: the dropped run is not inside the middle.
    """
    return contiguous(selection.middle, selection.keep, selection.spec.select.drop_from)


def contiguous(middle: Sequence[int], keep: int, drop_from: int | None = None) -> tuple[int, ...]:
    """The base indices of the kept blocks if one run of consecutive blocks is dropped.

    Args:
        middle: base indices of the middle, in order.
        keep: number of kept blocks.
        drop_from: base index of the first dropped block; None keeps equally many blocks before and after the run, or
            one more before it if `keep` is odd.

    Raises:
        UsageError: the dropped run is not inside the middle.
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
