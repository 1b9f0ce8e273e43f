"""The metric by which a study compares models (held-out loss for text, accuracy for pictures), and how to print it."""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.evaluation.row_scores import MetricName


@dataclass(frozen=True)
class Metric:
    """How a metric is named, scaled and printed in a report."""

    name: MetricName
    title: str
    unit: str  # of a score
    difference: str  # unit of a difference of two scores
    scale: float  # factor from the computed value to the printed one
    places: int  # decimal places
    higher_is_better: bool

    @property
    def axis(self) -> str:
        """The label of a plot's axis: the metric and its unit."""
        return f"{self.title[0].lower()}{self.title[1:]}, {self.unit}"

    def format(self, value: float) -> str:
        """Format a score or its uncertainty."""
        return f"{self.scale * value:.{self.places}f}"

    def format_difference(self, value: float) -> str:
        """Format a difference of two scores, with its sign."""
        return f"{self.scale * value:+.{self.places}f}"

    def is_gain(self, one: float, other: float) -> bool:
        """Whether the score `one` is better than the score `other`."""
        return one > other if self.higher_is_better else one < other


METRICS: Mapping[MetricName, Metric] = {
    "loss": Metric("loss", "Held-out loss", "nats per labelled token", "nats", 1.0, 3, higher_is_better=False),
    "accuracy": Metric("accuracy", "Held-out accuracy", "%", "points", 100.0, 1, higher_is_better=True),
}
