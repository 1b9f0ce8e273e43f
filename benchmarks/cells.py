"""The measurements of `benchmarks.tuning`: the shapes of models, the cells of the table, and the contestants.

A cell is one shape of a model on one data set. A contestant is a program with a tuning method: "offsite lora" and
"offsite full" run `offsite tune` on a bundle; the others, the peers, run transformers' Trainer on the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

RANK = 16
PAPER = "as the paper's code"
CONTESTANTS = ("full", "lora", f"full, {PAPER}", f"lora, {PAPER}", "offsite lora", "offsite full")
BEST = CONTESTANTS[:2]  # transformers' Trainer at its best
PADDED = CONTESTANTS[2:4]
PEERS = CONTESTANTS[:4]

# name -> bottom, emulator and top of the bundle
SHAPES: Mapping[str, tuple[int, int, int]] = {
    "smollm2": (2, 8, 2),  # of 30 blocks, real weights
    "gpt2-large": (2, 12, 2),  # of 36
    # OPT-1.3B has 24 blocks (bundle 2-8-2); full fine-tuning holds 18 bytes a parameter, too much for 24 GiB. Here 18
    # blocks of its width, of which half stay and a sixth trains, as there.
    "opt-1.3b, 18 blocks": (1, 6, 2),
}


@dataclass(frozen=True)
class Cell:
    """One shape of a model on one data set; every contestant trains on the same rows in the same steps."""

    shape: str
    data: str
    warmup: int  # optimiser steps before the clock starts
    steps: int  # optimiser steps on the clock
    batches: tuple[int, ...]  # rows at once that peers try; the rest of a step's rows accumulates
    rows: int = 16  # of an optimiser step
    longest: bool = False  # take the data's longest rows, where others take every length
    contestants: tuple[str, ...] = CONTESTANTS

    @property
    def name(self) -> str:
        """The cell's name in results and on the command line: the shape, a slash, the data set."""
        return f"{self.shape}/{self.data}"

    def times(self, repetitions: int) -> int:
        """The number of runs of each contestant: `repetitions`, and two more if the cell has no peers.

        Without peers the runs are short, and the machine's speed, which is measured before and after each, varies.
        """
        return repetitions if set(self.contestants) & set(PEERS) else repetitions + 2

    def shortened(self) -> "Cell":
        """A copy with one step of warm-up and at most three measured steps, which takes a few minutes."""
        return replace(self, warmup=1, steps=min(3, self.steps))


_UNPADDED = tuple(name for name in CONTESTANTS if name not in PADDED)
# The first cell also settles what peers gain from: memory, threads, bf16, attention (`benchmarks.tuning`)
CELLS: Mapping[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("smollm2", "sciq", 2, 6, (4, 16)),
        Cell("smollm2", "gsm8k", 1, 2, (4, 8), rows=8, contestants=(*CONTESTANTS[:3], *CONTESTANTS[4:])),
        Cell("gpt2-large", "sciq", 1, 2, (4, 16), contestants=_UNPADDED),
        Cell("opt-1.3b, 18 blocks", "sciq", 1, 2, (16,), contestants=_UNPADDED),
        # rows of 1024 tokens, for the share of the machine's peak; against whom is the next cell's matter
        Cell("gpt2-large", "wikitext2", 1, 2, (1, 2), rows=2, longest=True, contestants=CONTESTANTS[4:5]),
        Cell("opt-1.3b, 18 blocks", "wikitext2", 1, 2, (1, 2), rows=2, longest=True, contestants=CONTESTANTS[4:5]),
        Cell("gpt2-large", "gsm8k", 1, 2, (2, 4), contestants=_UNPADDED),
    )
}
DEFAULT = tuple(list(CELLS)[:-1])  # the last takes longer than all others together
FIRST = CELLS[DEFAULT[0]]
