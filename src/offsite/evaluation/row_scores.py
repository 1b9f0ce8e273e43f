"""The scores of single rows in a file, so that two models can be compared row by row without running them again.

A JSON line for each row ({"line", "nats", "tokens"}), then one for each multiple-choice question ({"line", "right",
"right_by_length"}) or picture ({"line", "right", "told"}, the class that it was taken for); `line` is that of the data
set, or the picture's place in it. Nothing else of a row is in it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offsite.errors import StorageError
from offsite.evaluation.intervals import Interval, paired_interval
from offsite.storage.files import replace_file

if TYPE_CHECKING:
    from offsite.evaluation.evaluate import Score
    from offsite.evaluation.image_scores import ImageScore

MetricName = Literal["loss", "accuracy"]  # nats per labelled token, or the share of right answers


@dataclass(frozen=True)
class RowScores:
    """What a model scored on each row of a data set, in the data set's order."""

    lines: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[float, ...]  # labelled ones
    right: tuple[float, ...]  # 1 or 0 for each question or picture; empty where there are none
    right_by_length: tuple[float, ...]  # of questions
    told: tuple[str, ...] = ()  # of pictures: the class that each was taken for

    @property
    def loss(self) -> float:
        """Nats per labelled token."""
        return self.mean("loss")

    def parts(self, metric: MetricName) -> tuple[Sequence[float], Sequence[float]]:
        """What a measure sums over rows, and the sizes that it divides by, (N,) each."""
        return (self.nats, self.tokens) if metric == "loss" else (self.right, (1.0,) * len(self.right))

    def mean(self, metric: MetricName) -> float:
        """The measure's value."""
        parts, sizes = self.parts(metric)
        return sum(parts) / sum(sizes)


def write_row_scores(file: Path, score: "Score") -> None:
    """Write the rows of a score.

    Raises:
        StorageError: the file cannot be written.
    """
    rows = [{"line": row.line, "nats": row.nats, "tokens": row.tokens} for row in score.row_losses]
    asked = [
        {"line": one.line, "right": one.right, "right_by_length": one.right_by_length} for one in score.choice_scores
    ]
    _write(file, [*rows, *asked])


def write_picture_scores(file: Path, score: "ImageScore") -> None:
    """Write the pictures of a score; each counts as one token.

    Raises:
        StorageError: the file cannot be written.
    """
    losses = [{"line": one.line, "nats": one.nats, "tokens": 1} for one in score.pictures]
    told = [{"line": one.line, "right": one.right, "told": one.told} for one in score.pictures]
    _write(file, [*losses, *told])


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    replace_file(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_row_scores(file: Path) -> RowScores:
    """Read what `write_row_scores` or `write_picture_scores` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [line for line in lines if "nats" in line]
        asked = [line for line in lines if "right" in line]
        if not rows:
            raise ValueError("it holds no row")
        return RowScores(
            lines=tuple(int(row["line"]) for row in rows),
            nats=tuple(float(row["nats"]) for row in rows),
            tokens=tuple(float(row["tokens"]) for row in rows),
            right=tuple(float(one["right"]) for one in asked),
            right_by_length=tuple(float(one["right_by_length"]) for one in asked if "told" not in one),
            told=tuple(str(one["told"]) for one in asked if "told" in one),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"cannot read the row scores {file}", reasons=[str(error)], next_step="score the model again"
        ) from None


def difference(one: RowScores, other: RowScores, metric: MetricName = "loss") -> tuple[float, Interval | None]:
    """One model's loss or accuracy minus another's, with the interval over the same drawn rows.

    Raises:
        ValueError: they were not scored on the same rows.
    """
    require_same_rows((one, other))
    (parts, sizes), (other_parts, other_sizes) = one.parts(metric), other.parts(metric)
    ends = paired_interval(parts, other_parts, sizes, other_sizes)
    return one.mean(metric) - other.mean(metric), ends


def require_same_rows(scores: Sequence[RowScores]) -> None:
    """Refuse to compare what was scored on different rows.

    Raises:
        ValueError: the rows differ.
    """
    if any(score.lines != scores[0].lines for score in scores):
        raise ValueError("the models were scored on different rows, so they cannot be compared row by row")
