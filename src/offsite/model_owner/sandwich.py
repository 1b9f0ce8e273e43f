"""The split of a base model by block index into bottom, middle and top."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sandwich:
    """The base indices of the blocks in each part of a split base.

    Blocks of bottom and top are trained, and so are `spread` blocks, which lie between blocks of the middle. The
    emulator is made from the middle.
    """

    bottom: tuple[int, ...]
    middle: tuple[int, ...]
    top: tuple[int, ...]
    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, trained: Collection[int], blocks: int) -> "Sandwich":
        """Split a base of `blocks` blocks, given the indices of the trained ones; at least one block must not train."""
        middle = [index for index in range(blocks) if index not in trained]
        first, last = middle[0], middle[-1]
        spread = sorted(index for index in trained if first < index < last)
        return cls(tuple(range(first)), tuple(middle), tuple(range(last + 1, blocks)), tuple(spread))

    def kept(self, emulator: Sequence[int]) -> tuple[int, ...]:
        """Base indices of all blocks of a bundle, in order: bottom, emulator with `spread` blocks, top.

        Args:
            emulator: base indices of the emulator's blocks; an index may occur several times.
        """
        return (*self.bottom, *sorted((*emulator, *self.spread)), *self.top)
