"""Differences between two models' scores on the same rows, with paired intervals, and the rows behind them.

A difference is called noise if its 95 % confidence interval includes zero, so that no conclusion is drawn from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from offsite.evaluation.intervals import Interval, paired_interval
from offsite.evaluation.row_scores import RowScores

ComparedMetric = Literal["loss", "accuracy", "accuracy_norm"]
Verdict = Literal["better", "worse", "noise", "equal", "too few rows"]
METRICS: tuple[ComparedMetric, ...] = ("loss", "accuracy", "accuracy_norm")
# If fewer rows differ, even a difference of the same sign on all of them is not significant at 95 % (sign test: 2^-5 of
# both signs together for 6 rows is 3 %, for 5 rows 6 %), whatever the bootstrap of so few rows says.
FEWEST_ROWS = 6


@dataclass(frozen=True)
class Difference:
    """How far one model's metric is from that of the first model, on the same rows.

    `value` is the model's metric minus the first model's. If the tokenizers differ, a difference of losses is in nats
    per labelled token of the first model, so that both sums of nats have the same denominator.
    """

    name: str  # of the model
    metric: ComparedMetric
    value: float
    interval: Interval | None  # None if there are fewer than two rows
    verdict: Verdict
    better: int  # number of rows or questions on which the model is better than the first
    worse: int
    equal: int


@dataclass(frozen=True)
class RowDifference:
    """One row on which a model and the first model differ: the loss of both, in nats per labelled token of the row."""

    name: str  # of the model
    file: str | None  # None if all rows are of one file
    line: int  # line in the file; number of the picture, or of the block of a long text
    first_loss: float
    loss: float
    nats: float  # difference of the summed nats; its part in the difference of the losses
    text: str | None = None  # None unless the texts of rows were requested


def metric_differences(name: str, other: RowScores, first: RowScores) -> list[Difference]:
    """Compare one model's scores with the first model's, by every metric that both have.

    Args:
        name: the name of the model in the result.
        other: the model's scores.
        first: the first model's scores, on the same rows.
    """
    found = []
    for metric in METRICS:
        (parts, sizes), (first_parts, _) = _parts(other, metric), _parts(first, metric)
        if not parts:
            continue
        sizes = first.tokens if metric == "loss" else sizes
        gaps = [part - first_part for part, first_part in zip(parts, first_parts, strict=True)]
        signs = [gap < 0 if metric == "loss" else gap > 0 for gap in gaps if gap]
        interval = paired_interval(parts, first_parts, sizes)
        value, equal = sum(gaps) / sum(sizes), len(gaps) - len(signs)
        verdict = _verdict(metric, value, interval, len(signs))
        found.append(Difference(name, metric, value, interval, verdict, sum(signs), len(signs) - sum(signs), equal))
    return found


def largest_differences(
    name: str, other: RowScores, first: RowScores, listed: int, texts: Mapping[tuple[str | None, int], str]
) -> list[RowDifference]:
    """The rows that contribute most to the difference of two models' losses, the largest first.

    Args:
        name: the name of the model in the result.
        other: the model's scores.
        first: the first model's scores, on the same rows.
        listed: the largest number of rows; rows without a difference are left out.
        texts: the text of a row by file name (None: all rows are of one file) and line; {} for none.
    """
    gaps = [nats - first_nats for nats, first_nats in zip(other.nats, first.nats, strict=True)]
    order = sorted((index for index, gap in enumerate(gaps) if gap), key=lambda index: -abs(gaps[index]))[:listed]
    return [
        RowDifference(
            name,
            file := first.files[index] if first.files else None,
            first.lines[index],
            first.nats[index] / first.tokens[index],
            other.nats[index] / other.tokens[index],
            gaps[index],
            texts.get((file, first.lines[index])),
        )
        for index in order
    ]


def _verdict(metric: ComparedMetric, value: float, interval: Interval | None, differing: int) -> Verdict:
    """What a difference means.

    Args:
        metric: the metric that differs.
        value: the difference.
        interval: its confidence interval; None if there are fewer than two rows.
        differing: the number of rows on which the two models differ.
    """
    if differing == 0:
        return "equal"
    if interval is None or differing < FEWEST_ROWS:
        return "too few rows"
    if interval.low <= 0 <= interval.high:
        return "noise"
    return "better" if (value < 0) == (metric == "loss") else "worse"


def _parts(scores: RowScores, metric: ComparedMetric) -> tuple[Sequence[float], Sequence[float]]:
    """Numerators and denominators of a metric for each row or question, (N,) each; empty if no row has the metric."""
    if metric == "accuracy_norm":
        return scores.right_by_length, (1.0,) * len(scores.right_by_length)
    return scores.parts(metric)
