"""The shares of the base's parameters that a bundle has verbatim, compressed, or not at all. Torch-free."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class BaseShares:
    """How many of the base's parameters a bundle sends unchanged, compressed, or not at all.

    Each parameter counts once. It is `verbatim` if the bundle has its value, at most rounded to the bundle's dtype. It
    is `compressed` if the bundle has another value in its place: a changed value, a zero, or one of a matrix that is
    stored in few bits or in factors. It is `not_sent` if the bundle has nothing in its place, as for dropped blocks and
    for the heads, neurons and experts that were removed from narrower blocks.
    """

    verbatim: int
    compressed: int
    not_sent: int

    @property
    def fractions(self) -> dict[str, float]:
        """The three counts as fractions of the base's number of parameters, keyed by field name."""
        total = self.verbatim + self.compressed + self.not_sent
        return {name: count / total for name, count in asdict(self).items()}
