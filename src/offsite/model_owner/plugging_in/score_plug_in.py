"""Scores a base and its plug-in on rows of the model owner's, and compares them row by row."""

from dataclasses import dataclass
from pathlib import Path

from offsite.config import EvalSpec
from offsite.errors import UsageError
from offsite.evaluation.differences import ComparedMetric, Verdict, metric_differences
from offsite.evaluation.evaluate import Score, evaluate
from offsite.evaluation.intervals import Interval
from offsite.evaluation.row_scores import row_scores
from offsite.model_owner.base_model import open_base
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, PlugIn


@dataclass(frozen=True)
class Comparison:
    """One metric of the base and of the plug-in on the same rows, and what their difference means."""

    metric: ComparedMetric
    base: float
    plug_in: float
    difference: float  # plug-in minus base
    interval: Interval | None  # 95 % interval of the difference, over rows; None if there are fewer than two rows
    verdict: Verdict

    @property
    def improves(self) -> bool:
        """Whether the plug-in has the lower loss, or the higher accuracy, certainly or by chance."""
        return self.difference < 0 if self.metric == "loss" else self.difference > 0


@dataclass(frozen=True)
class Transfer:
    """How a plug-in compares with its base: loss in nats per labelled token, and accuracy on multiple-choice rows."""

    rows: int
    tokens: int  # number of labelled tokens
    comparisons: tuple[Comparison, ...]  # the loss first


def score_base(base: Base, data: Path, measured: EvalSpec, progress: Progress = silent) -> Score:
    """Score the base alone, before its plug-in is written, so that bad rows are found before.

    Args:
        base: the owner's full model.
        data: the owner's held-out rows, in a format that `offsite.data.read_rows` reads.
        measured: sequence lengths, device and compute dtype, as for `evaluate`.
        progress: receives the progress events.

    Raises:
        UsageError: the base is an image encoder, which has no scores without a classifier.
        DataError: the data set is empty, or has bad or overlong rows.
        StorageError, IncompatibleError: as for `evaluate`.
    """
    family = open_base(base).family
    if family.vision is not None:
        raise UsageError(
            "--eval-data is for language models",
            reasons=[f"the base is an image encoder ({family.model_type}), which has no classifier to compare with"],
            next_step="leave --eval-data out, and score the plug-in with `offsite eval PLUGGED --data FOLDER`; "
            "`--probe FOLDER` scores the base",
        )
    progress(Event("scoring the base", 0))
    return evaluate(base, data, measured, progress=progress)


def score_plug_in(
    base: Base, plugged: PlugIn, data: Path, measured: EvalSpec, of_base: Score, progress: Progress = silent
) -> Transfer:
    """Score a plug-in on the rows on which its base was scored, and compare the two.

    Args:
        base: the owner's full model.
        plugged: its plug-in.
        data: the rows, as for `score_base`.
        measured: the settings, as for `score_base`.
        of_base: the base's score, from `score_base`.
        progress: receives the progress events.

    Raises:
        StorageError, IncompatibleError, VerificationError: as for `evaluate`.
    """
    progress(Event("scoring the plug-in", 0))
    if plugged.manifest.form == "adapter":
        tuned = evaluate(base, data, measured, adapter=plugged, progress=progress)
    else:
        tuned = evaluate(plugged, data, measured, progress=progress)
    found = metric_differences("plug-in", row_scores(tuned), row_scores(of_base))
    comparisons = tuple(
        Comparison(
            one.metric,
            getattr(of_base, one.metric),
            getattr(tuned, one.metric),
            one.value,
            one.interval,
            one.verdict,
        )
        for one in found
    )
    return Transfer(tuned.rows, tuned.tokens, comparisons)
