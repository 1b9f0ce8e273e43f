"""What a study compares models by: the held-out loss, or of pictures the accuracy; and how either is written."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.evaluation.row_scores import Measure


@dataclass(frozen=True)
class Primary:
    """A measure as a reader sees it."""

    name: Measure
    title: str
    unit: str  # of a score
    difference: str  # unit of a difference of two scores
    scale: float  # from the measure's own number to the one that is shown
    places: int  # behind the point
    higher_is_better: bool

    @property
    def axis(self) -> str:
        """A label for an axis."""
        return f"{self.title[0].lower()}{self.title[1:]}, {self.unit}"

    def shown(self, value: float) -> str:
        """A score, or how far it may be off."""
        return f"{self.scale * value:.{self.places}f}"

    def signed(self, value: float) -> str:
        """A difference of two scores."""
        return f"{self.scale * value:+.{self.places}f}"

    def is_gain(self, one: float, other: float) -> bool:
        """Whether a score is better than another."""
        return one > other if self.higher_is_better else one < other


PRIMARIES: Mapping[Measure, Primary] = {
    "loss": Primary("loss", "Held-out loss", "nats per labelled token", "nats", 1.0, 3, higher_is_better=False),
    "accuracy": Primary("accuracy", "Held-out accuracy", "%", "points", 100.0, 1, higher_is_better=True),
}
