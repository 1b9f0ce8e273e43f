"""The report of the kernels: which parts of a model were replaced, and why or why not. Torch-free."""

from dataclasses import dataclass, replace
from typing import Literal

Backend = Literal["reference", "cpu", "cuda"]

# Names of pieces that several backends report.
NORMS = "RMS norms"
MLPS = "gated MLPs"
ATTENTION = "attention"
LORA = "LoRA layers"

ABSENT = "the model has none of a known form"  # this reason is not printed, since nothing can be done about it


@dataclass(frozen=True)
class Piece:
    """An entry of the report: one kind of module that a backend may replace, or one choice that it makes.

    Attributes:
        name: the kind of module or the choice, such as "RMS norms".
        count: how many modules were replaced, or how many micro-batches run at once; 0 if nothing was replaced.
        reason: why, or why not.
    """

    name: str
    count: int
    reason: str


@dataclass(frozen=True)
class Report:
    """The report of the kernels on one model: its backend, and one entry for each kind of module or choice."""

    backend: Backend
    pieces: tuple[Piece, ...] = ()

    def with_pieces(self, *pieces: Piece) -> "Report":
        """A copy of the report with more entries; a new entry replaces an old one of the same name."""
        names = {piece.name for piece in pieces}
        return replace(self, pieces=(*(piece for piece in self.pieces if piece.name not in names), *pieces))

    def in_words(self) -> str:
        """One line of text: the backend, and each kind of module that it did not replace, with the reason.

        Kinds that the model does not have are left out.
        """
        left = [f"{piece.name} ({piece.reason})" for piece in self.pieces if not piece.count and piece.reason != ABSENT]
        return f"kernels: {self.backend}" + (f"; not in use: {', '.join(left)}" if left else "; all in use")

    def as_dict(self) -> dict[str, object]:
        """The report as a dictionary of plain values, for a log or `--json`."""
        return {"backend": self.backend, "pieces": [vars(piece) for piece in self.pieces]}
