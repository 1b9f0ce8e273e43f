"""What `benchmarks.images` measures: shapes of encoders, how each is cut, and who takes part."""

from collections.abc import Mapping
from dataclasses import dataclass

BEST = ("full", "lora")  # transformers' Trainer at its best, on the whole encoder


@dataclass(frozen=True)
class ImageCell:
    """One encoder; every contestant sees the same pictures, cropped alike, in the same steps."""

    shape: str
    splits: tuple[str, ...]  # bottom, emulator and top of the bundles
    rows: int  # pictures of an optimiser step
    warmup: int  # optimiser steps before the clock starts
    steps: int  # optimiser steps on the clock
    batches: tuple[int, ...]  # pictures at once that peers try; the rest of a step accumulates
    side: int = 224  # pixels
    classes: int = 10

    @property
    def contestants(self) -> tuple[str, ...]:
        """Peers, then both methods of tuning on each bundle."""
        return (*BEST, *(f"offsite {method}, {split}" for split in self.splits for method in ("lora", "full")))

    @property
    def pictures(self) -> int:
        """As many as its steps take: each is seen once."""
        return self.rows * (self.warmup + self.steps)


def split_of(contestant: str) -> tuple[int, int, int]:
    """Bottom, emulator and top of a contestant of ours."""
    bottom, keep, top = map(int, contestant.split(", ")[1].split("-"))
    return bottom, keep, top


# The first cell also settles what peers gain from: kept memory, spinning threads, bf16, sdpa.
CELLS: Mapping[str, ImageCell] = {
    cell.shape: cell
    for cell in (
        ImageCell("vit-s-14", ("4-4-4", "0-4-4"), 16, 1, 2, (4, 16)),  # of 12 blocks
        ImageCell("clip-vit-l-14", ("2-8-2",), 4, 1, 2, (4,)),  # of 24
    )
}
FIRST = next(iter(CELLS.values()))
