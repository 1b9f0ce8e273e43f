"""Compares models on the same rows: each model's metrics, and how far each is from the first, row by row.

`offsite.evaluation.differences` says which differences are noise.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offsite.config import EvalSpec
from offsite.data.data_files import DataPaths
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.errors import IncompatibleError, UsageError
from offsite.evaluation.differences import Difference, RowDifference, largest_differences, metric_differences
from offsite.evaluation.evaluate import evaluate
from offsite.evaluation.image_scores import evaluate_images
from offsite.evaluation.intervals import Interval
from offsite.evaluation.lineage import require_lineage
from offsite.evaluation.row_scores import RowScores, picture_scores, require_same_rows, row_scores
from offsite.models.image_encoder import is_classifier, sees_images
from offsite.models.model_folder import model_settings
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return, files_of

LISTED = 10  # number of rows with the largest differences that are listed by default


@dataclass(frozen=True)
class Contestant:
    """A model to compare: its name in the result, the model, and the adapter on it (None: no adapter)."""

    name: str
    model: Path | Base | Bundle | PlugIn
    adapter: Path | Return | PlugIn | None = None


@dataclass(frozen=True)
class ModelFigures:
    """The metrics of one model: loss in nats per labelled token (of a picture: nats), and shares of right answers."""

    name: str
    loss: float
    accuracy: float | None  # None if no row is multiple choice
    accuracy_norm: float | None  # the same by likelihood per character; None also for pictures
    rows: int
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: every model's metrics, the differences from the first model, and the rows behind."""

    models: tuple[ModelFigures, ...]
    differences: tuple[Difference, ...]
    rows: tuple[RowDifference, ...] = field(repr=False)
    same_tokens: bool = True  # whether all models split the rows into the same numbers of labelled tokens


def compare(
    contestants: Sequence[Contestant],
    data: DataPaths,
    spec: EvalSpec,
    *,
    probe: Path | None = None,
    listed: int = LISTED,
    with_text: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Score models on the same rows, one after the other, and compare each with the first.

    Args:
        contestants: at least two models, all language models or all image models.
        data: the held-out rows or pictures, as for `evaluate`.
        spec: the settings of the evaluation.
        probe: pictures to fit a linear probe on, for encoders without a classifier; otherwise None.
        listed: the number of rows with the largest differences that are listed for each model.
        with_text: whether these rows are listed with their text (of pictures: their names).
        progress: receives the progress events.

    Raises:
        UsageError: there are fewer than two models, or both kinds of models.
        IncompatibleError: an adapter is for another model, or the models cannot be compared row by row.
        OffsiteError: as `evaluate` and `evaluate_images` raise.
    """
    images = _all_see_images(contestants)
    for one in contestants:  # before any model is scored
        require_lineage(one.model, one.adapter)
    figures, scores = [], []
    for number, one in enumerate(contestants, start=1):
        progress(Event("comparing models", number - 1, len(contestants), {"model": one.name}))
        found, by_row = (
            _score_pictures(one, data, spec, probe, progress) if images else _score_rows(one, data, spec, progress)
        )
        figures.append(found)
        scores.append(by_row)
    progress(Event("comparing models", len(contestants), len(contestants)))
    _require_same_rows(contestants, scores)
    texts = _texts(data, spec, images=images) if with_text else {}
    first = scores[0]
    return Comparison(
        models=tuple(figures),
        differences=tuple(
            difference
            for one, by_row in list(zip(contestants, scores, strict=True))[1:]
            for difference in metric_differences(one.name, by_row, first)
        ),
        rows=tuple(
            row
            for one, by_row in list(zip(contestants, scores, strict=True))[1:]
            for row in largest_differences(one.name, by_row, first, listed, texts)
        ),
        same_tokens=all(by_row.tokens == first.tokens for by_row in scores),
    )


def _all_see_images(contestants: Sequence[Contestant]) -> bool:
    """Whether all models are image models.

    Raises:
        UsageError: there are fewer than two models, or both kinds.
    """
    if len(contestants) < 2:
        raise UsageError(
            "there is nothing to compare with", next_step="name at least two models: `offsite compare BASE OTHER`"
        )
    kinds = {one.name: sees_images(model_settings(files_of(one.model))) for one in contestants}
    if len(set(kinds.values())) > 1:
        raise UsageError(
            "language models and image models cannot be compared",
            reasons=[f"{name} {'sees images' if images else 'is a language model'}" for name, images in kinds.items()],
            next_step="name models of one kind",
        )
    return all(kinds.values())


def _score_rows(one: Contestant, data: DataPaths, spec: EvalSpec, progress: Progress) -> tuple[ModelFigures, RowScores]:
    """Score a language model; returns its metrics, and its score of every row."""
    score = evaluate(one.model, data, spec, adapter=one.adapter, progress=progress)
    names = ("loss", "accuracy", "accuracy_norm")
    intervals = {name: ends for name, ends in score.intervals.items() if name in names}
    figures = ModelFigures(one.name, score.loss, score.accuracy, score.accuracy_norm, score.rows, intervals)
    return figures, row_scores(score)


def _score_pictures(
    one: Contestant, data: DataPaths, spec: EvalSpec, probe: Path | None, progress: Progress
) -> tuple[ModelFigures, RowScores]:
    """Score an image model; returns its metrics, and its score of every picture."""
    if isinstance(one.adapter, PlugIn):
        raise IncompatibleError(
            f"the plug-in {one.adapter.folder} is an adapter of a language model, and {one.name} sees images",
            next_step="name a return behind its bundle, or a complete plug-in",
        )
    bare = one.adapter is None and not is_classifier(model_settings(files_of(one.model)))
    score = evaluate_images(
        one.model, data, spec, adapter=one.adapter, probe=probe if bare else None, progress=progress
    )
    figures = ModelFigures(one.name, score.loss, score.accuracy, None, score.rows, score.intervals)
    return figures, picture_scores(score)


def _require_same_rows(contestants: Sequence[Contestant], scores: Sequence[RowScores]) -> None:
    """Check that the models were scored on the same rows; models with other tokenizers may leave out other long rows.

    Raises:
        IncompatibleError: the rows differ.
    """
    try:
        require_same_rows(scores)
    except ValueError as problem:
        raise IncompatibleError(
            str(problem),
            reasons=[f"{one.name}: {len(score.lines)} rows" for one, score in zip(contestants, scores, strict=True)],
            next_step="leave out rows that are too long for one of the models, and write a long text as separate rows: "
            "its blocks depend on the tokenizer",
        ) from None


def _texts(data: DataPaths, spec: EvalSpec, *, images: bool) -> dict[tuple[str | None, int], str]:
    """The text of each row, or the name of each picture, by the name of its file and its line.

    Of rows that are of several files, those whose file name and line are not unique are left out; so are long texts,
    whose blocks have numbers in place of lines.
    """
    if images:
        pictures = read_pictures(data, part="held out", columns=spec.columns)
        return {(None, number): picture.name for number, picture in enumerate(pictures, start=1)}
    rows = [row for row in read_rows(data, RowForm(spec.columns or {}, spec.chosen), "held out") if not row.document][
        : spec.max_rows
    ]
    several = len({row.file for row in rows}) > 1
    places = [(row.file.name if several and row.file else None, row.line) for row in rows]
    counts = Counter(places)
    return {place: row.whole_text for place, row in zip(places, rows, strict=True) if counts[place] == 1}
