"""The measurements of `benchmarks.images`: the shapes of encoders, the splits of their bundles, and the contestants.

A contestant is a program with a tuning method, such as "offsite lora, 4-4-4" (`offsite tune` on a bundle) or "lora"
(a peer: transformers' Trainer on the whole encoder).
"""

from collections.abc import Mapping
from dataclasses import dataclass

BEST = ("full", "lora")  # transformers' Trainer at its best, on the whole encoder


@dataclass(frozen=True)
class ImageCell:
    """One encoder; every contestant trains on the same pictures, with the same crops, in the same steps."""

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
        """The names of the contestants: the peers, then LoRA and full tuning of each bundle."""
        return (*BEST, *(f"offsite {method}, {split}" for split in self.splits for method in ("lora", "full")))

    @property
    def pictures(self) -> int:
        """The number of pictures that all steps need together; each is used once."""
        return self.rows * (self.warmup + self.steps)


def split_of(contestant: str) -> tuple[int, int, int]:
    """The numbers of bottom, emulator and top blocks in a contestant's name, such as "offsite lora, 4-4-4"."""
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
