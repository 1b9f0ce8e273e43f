"""Files with the score of every row, so that two models can be compared row by row without running them again.

Such a file has a JSON line for each row ({"line", "nats", "tokens"}), then one for each multiple-choice question
({"line", "right", "right_by_length"}) or picture ({"line", "right", "told"}, where "told" is the predicted class).
`line` is the row's line in its file, and `file` names that file if there are several; of a picture, `line` is its
number. The scores contain no text or pixels of a row.
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
    from offsite.evaluation.multiple_choice import ChoiceScore
    from offsite.evaluation.row_losses import RowLoss

MetricName = Literal["loss", "accuracy"]  # nats per labelled token, or the share of right answers


@dataclass(frozen=True)
class RowScores:
    """One model's score on each row of a data set, in the order of the data set."""

    lines: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[float, ...]  # labelled tokens
    right: tuple[float, ...]  # 1 (right) or 0 (wrong) for each question or picture; empty if there are none
    right_by_length: tuple[float, ...]  # 1 or 0 for each question, by likelihood per character
    predictions: tuple[str, ...] = ()  # the predicted class of each picture
    files: tuple[str, ...] = ()  # the name of each row's file, if the rows are of several files
    question_lines: tuple[int, ...] = ()  # the line of each question, or the number of each picture
    question_files: tuple[str, ...] = ()  # the name of each question's file, if the rows are of several files

    @property
    def loss(self) -> float:
        """The loss over all rows in nats per labelled token."""
        return self.mean("loss")

    def parts(self, metric: MetricName) -> tuple[Sequence[float], Sequence[float]]:
        """Numerators and denominators of a metric for each row, (N,) each; the metric is the ratio of their sums."""
        return (self.nats, self.tokens) if metric == "loss" else (self.right, (1.0,) * len(self.right))

    def mean(self, metric: MetricName) -> float:
        """The value of a metric over all rows."""
        parts, sizes = self.parts(metric)
        return sum(parts) / sum(sizes)


def write_row_scores(file: Path, score: "Score") -> None:
    """Write the score of every row of a data set, and of every multiple-choice question.

    Raises:
        StorageError: the file cannot be written.
    """
    _write(file, _row_lines(score))


def row_scores(score: "Score") -> RowScores:
    """The score of every row and question of a data set, as `read_row_scores` reads them from a file."""
    return _parse(_row_lines(score))


def _row_lines(score: "Score") -> list[dict[str, Any]]:
    """The lines of a file of row scores: one for each row, then one for each multiple-choice question."""
    several = len({row.file for row in score.row_losses} | {one.file for one in score.choice_scores}) > 1

    def place(row: "RowLoss | ChoiceScore") -> dict[str, Any]:
        return {"file": str(row.file), "line": row.line} if several and row.file else {"line": row.line}

    rows = [{**place(row), "nats": row.nats, "tokens": row.tokens} for row in score.row_losses]
    questions = [
        {**place(one), "right": one.right, "right_by_length": one.right_by_length} for one in score.choice_scores
    ]
    return [*rows, *questions]


def write_picture_scores(file: Path, score: "ImageScore") -> None:
    """Write the score of every picture; for the loss, a picture counts as one token.

    Raises:
        StorageError: the file cannot be written.
    """
    _write(file, _picture_lines(score))


def picture_scores(score: "ImageScore") -> RowScores:
    """The score of every picture, as `read_row_scores` reads them from a file."""
    return _parse(_picture_lines(score))


def _picture_lines(score: "ImageScore") -> list[dict[str, Any]]:
    """The lines of a file of picture scores: one for each picture's loss, then one for each prediction."""
    losses = [{"line": one.line, "nats": one.nats, "tokens": 1} for one in score.pictures]
    predictions = [{"line": one.line, "right": one.right, "told": one.predicted} for one in score.pictures]
    return [*losses, *predictions]


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines to a file, replacing it in one step."""
    replace_file(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_row_scores(file: Path) -> RowScores:
    """Read a file that `write_row_scores` or `write_picture_scores` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return _parse(lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"cannot read the row scores {file}", reasons=[str(error)], next_step="score the model again"
        ) from None


def _parse(lines: Sequence[dict[str, Any]]) -> RowScores:
    """Make `RowScores` of the lines of a file.

    Raises:
        ValueError, KeyError, TypeError: a line is malformed, or there is no row.
    """
    rows = [line for line in lines if "nats" in line]
    questions = [line for line in lines if "right" in line]
    if not rows:
        raise ValueError("it has no rows")
    return RowScores(
        lines=tuple(int(row["line"]) for row in rows),
        nats=tuple(float(row["nats"]) for row in rows),
        tokens=tuple(float(row["tokens"]) for row in rows),
        right=tuple(float(one["right"]) for one in questions),
        right_by_length=tuple(float(one["right_by_length"]) for one in questions if "told" not in one),
        predictions=tuple(str(one["told"]) for one in questions if "told" in one),
        files=tuple(Path(str(row["file"])).name for row in rows if "file" in row),
        question_lines=tuple(int(one["line"]) for one in questions),
        question_files=tuple(Path(str(one["file"])).name for one in questions if "file" in one),
    )


def difference(one: RowScores, other: RowScores, metric: MetricName = "loss") -> tuple[float, Interval | None]:
    """Compute the difference of two models' loss or accuracy (the first minus the second), and its interval.

    The interval is None if there are fewer than two rows.

    Raises:
        ValueError: the models were not scored on the same rows.
    """
    require_same_rows((one, other))
    (parts, sizes), (other_parts, other_sizes) = one.parts(metric), other.parts(metric)
    ends = paired_interval(parts, other_parts, sizes, other_sizes)
    return one.mean(metric) - other.mean(metric), ends


def require_same_rows(scores: Sequence[RowScores]) -> None:
    """Refuse to compare scores of models on different rows.

    Raises:
        ValueError: the rows differ.
    """
    places = [(score.files, score.lines, score.question_files, score.question_lines) for score in scores]
    if any(place != places[0] for place in places):
        raise ValueError("the models were scored on different rows, so they cannot be compared row by row")
