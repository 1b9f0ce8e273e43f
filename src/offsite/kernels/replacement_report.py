"""The report of the kernels: which pieces of a model were replaced, and why or why not. Torch-free."""

from dataclasses import dataclass, replace
from typing import Literal

Backend = Literal["reference", "cpu", "cuda"]

# Names of pieces that several backends report.
NORMS = "RMS norms"
MLPS = "gated MLPs"
ATTENTION = "attention"
LORA = "LoRA layers"

ABSENT = "the model has none of a known form"  # a reason for which nobody has to do anything


@dataclass(frozen=True)
class Piece:
    """One thing that a backend may replace or choose.

    Attributes:
        name: of the thing, such as "RMS norms".
        count: how many were replaced, or how many run at once; 0 where nothing was replaced.
        reason: why, or why not.
    """

    name: str
    count: int
    reason: str


@dataclass(frozen=True)
class Report:
    """The backend of a model, and what became of each piece."""

    backend: Backend
    pieces: tuple[Piece, ...] = ()

    def with_pieces(self, *pieces: Piece) -> "Report":
        """A copy of the report with more pieces; a new piece replaces an old one of the same name."""
        names = {piece.name for piece in pieces}
        return replace(self, pieces=(*(piece for piece in self.pieces if piece.name not in names), *pieces))

    def in_words(self) -> str:
        """The backend, and what it did not replace and why not; a piece that the model does not have is left out."""
        left = [f"{piece.name} ({piece.reason})" for piece in self.pieces if not piece.count and piece.reason != ABSENT]
        return f"kernels: {self.backend}" + (f"; not in use: {', '.join(left)}" if left else "; all in use")

    def as_dict(self) -> dict[str, object]:
        """For a log or `--json`."""
        return {"backend": self.backend, "pieces": [vars(piece) for piece in self.pieces]}
