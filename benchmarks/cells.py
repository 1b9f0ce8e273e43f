"""What `benchmarks.tuning` measures: shapes of models, cells of the table, and who takes part in each."""

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
    """One shape on one data set; every contestant sees the same rows in the same steps."""

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
        """As records and flags have it."""
        return f"{self.shape}/{self.data}"

    def times(self, repetitions: int) -> int:
        """How often each contestant runs: ours alone are short, and what the products reach beside them drifts."""
        return repetitions if set(self.contestants) & set(PEERS) else repetitions + 2

    def shortened(self) -> "Cell":
        """The same in a few minutes."""
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
