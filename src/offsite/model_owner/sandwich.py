"""How a base model is cut by block index: bottom, middle and top."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sandwich:
    """A base cut by block index: bottom and top train, and `spread` between them; the others become the emulator."""

    bottom: tuple[int, ...]
    middle: tuple[int, ...]
    top: tuple[int, ...]
    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, trained: Collection[int], blocks: int) -> "Sandwich":
        """Of so many blocks, of which these train and at least one does not."""
        middle = [index for index in range(blocks) if index not in trained]
        first, last = middle[0], middle[-1]
        spread = sorted(index for index in trained if first < index < last)
        return cls(tuple(range(first)), tuple(middle), tuple(range(last + 1, blocks)), tuple(spread))

    def kept(self, emulator: Sequence[int]) -> tuple[int, ...]:
        """All blocks of the bundle, where the emulator has these; one may stand in several places."""
        return (*self.bottom, *sorted((*emulator, *self.spread)), *self.top)
