"""What the seam reports: which pieces of a model it replaced, and why or why not. Torch-free."""

from dataclasses import dataclass, replace
from typing import Literal

Backend = Literal["reference", "cpu", "cuda"]


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
        """The report with more pieces; one of a name that is there takes its place."""
        names = {piece.name for piece in pieces}
        return replace(self, pieces=(*(piece for piece in self.pieces if piece.name not in names), *pieces))

    def as_dict(self) -> dict[str, object]:
        """For a log or `--json`."""
        return {"backend": self.backend, "pieces": [vars(piece) for piece in self.pieces]}
