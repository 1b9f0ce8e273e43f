"""The scores of single rows in a file, so that two models can be compared row by row without running them again.

A JSON line for each row ({"line", "nats", "tokens"}), then one for each multiple-choice question ({"line", "right",
"right_by_length"}); `line` is that of the data set. No text of a row is in it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.core.storage import replace_file
from offsite.errors import StorageError
from offsite.measure.bootstrap import Interval, paired_interval

if TYPE_CHECKING:
    from offsite.measure.evaluate import Score


@dataclass(frozen=True)
class RowScores:
    """What a model scored on each row of a data set, in the data set's order."""

    lines: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[float, ...]  # labelled ones
    right: tuple[float, ...]  # 1 or 0 for each question; empty where there are none
    right_by_length: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Nats per labelled token."""
        return sum(self.nats) / sum(self.tokens)


def write_row_scores(file: Path, score: "Score") -> None:
    """Write the rows of a score.

    Raises:
        StorageError: the file cannot be written.
    """
    rows = [{"line": row.line, "nats": row.nats, "tokens": row.tokens} for row in score.row_losses]
    asked = [
        {"line": one.line, "right": one.right, "right_by_length": one.right_by_length} for one in score.choice_scores
    ]
    replace_file(file, "".join(json.dumps(line) + "\n" for line in (*rows, *asked)).encode())


def read_row_scores(file: Path) -> RowScores:
    """Read what `write_row_scores` wrote.

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
            right_by_length=tuple(float(one["right_by_length"]) for one in asked),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"cannot read the row scores {file}", reasons=[str(error)], next_step="score the model again"
        ) from None


def loss_difference(one: RowScores, other: RowScores) -> tuple[float, Interval | None]:
    """One model's loss minus another's, with the interval over the same drawn rows.

    Raises:
        ValueError: they were not scored on the same rows.
    """
    require_same_rows((one, other))
    ends = paired_interval(one.nats, other.nats, one.tokens, other.tokens)
    return one.loss - other.loss, ends


def require_same_rows(scores: Sequence[RowScores]) -> None:
    """Refuse to compare what was scored on different rows.

    Raises:
        ValueError: the rows differ.
    """
    if any(score.lines != scores[0].lines for score in scores):
        raise ValueError("the models were scored on different rows, so they cannot be compared row by row")
