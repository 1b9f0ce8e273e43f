"""The results of a study: figures of every grid point, from the records of its stages and the scores of single rows.

The primary score is the held-out loss in nats per labelled token, or for pictures the accuracy. Intervals are 95 % over
test rows, by the bootstrap (`offsite.evaluation.intervals`). Differences and shares of a gain use the same resampled
test rows for every model.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from offsite import __version__
from offsite.evaluation.intervals import Interval, interval, share_interval
from offsite.evaluation.row_scores import MetricName, RowScores, difference, read_row_scores, require_same_rows
from offsite.model_owner.tuning_arithmetic import TuningArithmetic
from offsite.study.grid import GridPoint
from offsite.study.metric import METRICS
from offsite.study.recipe import Recipe
from offsite.study.resumable_chain import OWNER, TUNER
from offsite.study.run_grid import read_record
from offsite.study.stages import Stage, with_prerequisites
from offsite.training.run_log import log_file, records

_LIBRARIES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Figure:
    """A value, with its confidence interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RowResult:
    """The scores of one model of a grid point."""

    primary: Figure  # the score by which models are compared: the loss, or for pictures the accuracy
    loss: Figure  # nats per labelled token, or per picture
    perplexity: float | None  # None where it overflows, and of pictures
    against_zero_shot: Figure | None  # primary score minus that of the untouched base, paired
    accuracy: float | None  # share of right answers; None where rows are neither multiple choice nor pictures
    accuracy_stderr: float | None
    accuracy_norm: float | None
    accuracy_norm_stderr: float | None
    rows: int
    tokens: int


@dataclass(frozen=True)
class Spent:
    """The time and peak memory of one stage, as the operating system measured them."""

    stage: str
    party: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class GridPointResult:
    """The results of one grid point; a figure is None or left out if it is not computed yet or its stage failed."""

    dataset: str
    score: str
    compress: str
    placement: str | None
    tune: str
    method: str
    seed: int
    scores: Mapping[str, RowResult]
    gain_recovered: Figure | None  # (plug_in - zero_shot) / (full - zero_shot), of primary scores
    bound_recovered: Figure | None  # the same with adapter_on_base in place of full
    own_gain: Figure | None  # (emulator - zero_shot) / (full - zero_shot): what the data owner has without the owner
    plug_in_gap: Figure | None  # plug_in - emulator: if better, the data owner does not have what the owner gets
    base_parameters: Mapping[str, float] | None  # shares of the base's: "verbatim", "compressed", "not_sent"
    arithmetic: float | None  # multiply-adds of tuning, as a share of LoRA on every block of the base; calculated
    bundle_bytes: int | None
    return_bytes: int | None
    seconds: Mapping[str, float]  # by party
    peak_bytes: Mapping[str, int]  # by party
    spent: Sequence[Spent]
    errors: Mapping[str, str]  # by row of the result table
    log: str | None  # the tuning's log, relative to the study's folder


@dataclass(frozen=True)
class Results:
    """The results of a whole study; the fields are the keys of results.json."""

    title: str
    about: str
    base: str
    primary: MetricName
    rows: Sequence[str]
    environment: Mapping[str, Any]
    cells: Sequence[GridPointResult]


def collect(recipe: Recipe, points: Sequence[GridPoint], folder: Path) -> Results:
    """Collect the results of a study from the stages that have run so far.

    Args:
        recipe: the study's recipe.
        points: the grid points of the study.
        folder: the study's folder.
    """
    cache: dict[str, RowScores] = {}
    found = [_point_result(point, folder, cache) for point in points]
    base, metric = Path(recipe.base).name, points[0].metric  # one base, so one metric for all points
    return Results(recipe.title, recipe.about, base, metric, list(recipe.rows), _environment(), found)


def _environment() -> dict[str, Any]:
    """The versions of Python and of libraries, and the system, for the report."""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    return {"offsite": __version__, "python": platform.python_version(), **machine, **libraries}


def _point_result(point: GridPoint, folder: Path, cache: dict[str, RowScores]) -> GridPointResult:
    """Collect the results of a grid point; `cache` has the row scores that were already read, by the stage's key."""
    known: dict[str, Mapping[str, Any]] = {
        row: record
        for row, stage in point.rows.items()
        if (record := read_record(folder, stage)).get("done") and stage.out.exists()
    }
    rows = {row: _row_scores(point.rows[row], cache) for row in known}  # type: ignore[index]
    scores = {
        row: _score(record["result"], rows[row], rows.get("zero_shot"), point.metric) for row, record in known.items()
    }
    pack, tune = read_record(folder, point.pack), read_record(folder, point.tune)
    split = pack.get("result", {}).get("split") if pack.get("done") else None
    spent = [
        Spent(stage.name, stage.party, record["seconds"], record["peak_bytes"])
        for stage in point.protocol
        if (record := read_record(folder, stage)).get("done")
    ]
    log = log_file(point.tune.out)
    return GridPointResult(
        dataset=point.dataset.name,
        score=point.dataset.score,
        compress=point.compressor.name,
        placement=point.compressor.placement or (_placement(split) if split else None),
        tune=point.method.name,
        method=point.method.spec.adapter.method,
        seed=point.seed,
        scores=scores,
        gain_recovered=_share_of_gain(rows, "plug_in", "full", point.metric),
        bound_recovered=_share_of_gain(rows, "plug_in", "adapter_on_base", point.metric),
        own_gain=_share_of_gain(rows, "emulator", "full", point.metric),
        plug_in_gap=_difference(rows.get("plug_in"), rows.get("emulator"), point.metric),
        base_parameters=pack["result"].get("base_parameters") if pack.get("done") else None,
        arithmetic=_arithmetic(pack["result"], point.method.spec.adapter.method, log) if pack.get("done") else None,
        bundle_bytes=pack["result"]["bytes"] if pack.get("done") else None,
        return_bytes=tune["result"]["bytes"] if tune.get("done") else None,
        seconds={party: round(sum(s.seconds for s in spent if s.party == party), 2) for party in (OWNER, TUNER)},
        peak_bytes=_peaks(spent),
        spent=spent,
        errors={
            row: error for row, stage in point.rows.items() if row not in known and (error := _error(stage, folder))
        },
        log=str(log.relative_to(folder.resolve())) if log.exists() else None,
    )


def _row_scores(stage: Stage, cache: dict[str, RowScores]) -> RowScores:
    """The row scores that a scoring stage wrote, read from its file or from `cache`."""
    if stage.key not in cache:
        cache[stage.key] = read_row_scores(stage.out)
    return cache[stage.key]


def _score(result: Mapping[str, Any], rows: RowScores, zero_shot: RowScores | None, metric: MetricName) -> RowResult:
    """The scores of one model of a grid point.

    Args:
        result: the JSON that the scoring command printed.
        rows: the model's scores of single test rows.
        zero_shot: the untouched base's scores of the same rows; None if they are missing.
        metric: the metric by which the models are compared.
    """
    return RowResult(
        primary=_figure(rows.mean(metric), interval(*rows.parts(metric))),
        loss=_figure(rows.loss, interval(*rows.parts("loss"))),
        perplexity=result.get("perplexity"),
        against_zero_shot=None if zero_shot in (None, rows) else _difference(rows, zero_shot, metric),
        accuracy=_share_right(rows.right),
        accuracy_stderr=_stderr(rows.right),
        accuracy_norm=_share_right(rows.right_by_length),
        accuracy_norm_stderr=_stderr(rows.right_by_length),
        rows=len(rows.lines),
        tokens=int(sum(rows.tokens)),
    )


def _share_right(right: Sequence[float]) -> float | None:
    """The share of right answers; None if there are no answers."""
    return sum(right) / len(right) if right else None


def _stderr(right: Sequence[float]) -> float | None:
    """The standard error of the share of right answers, from the sample variance, as in lm-evaluation-harness.

    Args:
        right: 1 for each right answer, 0 for each wrong one; fewer than two answers give None.
    """
    share = _share_right(right)
    return math.sqrt(share * (1 - share) / (len(right) - 1)) if share is not None and len(right) > 1 else None


def _figure(value: float, ends: Interval | None) -> Figure:
    """A figure from a value and its confidence interval; `ends` is None if it has no interval."""
    return Figure(value, ends.low, ends.high) if ends else Figure(value)


def _difference(one: RowScores | None, other: RowScores | None, metric: MetricName) -> Figure | None:
    """The difference of two models' scores, the first minus the second; None if one of them is missing."""
    return None if one is None or other is None else _figure(*difference(one, other, metric))


def _share_of_gain(rows: Mapping[str, RowScores], part: str, whole: str, metric: MetricName) -> Figure | None:
    """The gain over zero-shot of the model `part`, divided by that of `whole`; both are keys of `rows`.

    None if a score is missing, or if `whole` has no gain.
    """
    if not {"zero_shot", whole, part} <= rows.keys():
        return None
    zero, best, reached = rows["zero_shot"], rows[whole], rows[part]
    require_same_rows((zero, best, reached))
    least, most, there = (one.mean(metric) for one in (zero, best, reached))
    if not METRICS[metric].is_gain(most, least):
        return None
    ends = share_interval(zero.parts(metric), best.parts(metric), reached.parts(metric))
    return _figure((there - least) / (most - least), ends)


def _arithmetic(packed: Mapping[str, Any], method: str, log: Path) -> float | None:
    """The multiply-adds of tuning, as a share of LoRA on every block of the base; None if they are not known.

    Args:
        packed: the JSON that `pack` printed.
        method: the tuning method.
        log: the tuning's log, which has the numbers of tokens and of labelled tokens in each step.
    """
    counts = packed.get("tuning_multiply_adds_per_token")
    if counts is None:
        return None
    fields = {name: count for name, count in counts.items() if name != "share_of_lora_on_base"}
    tokens, labels = (sum(record.get(name, 0) for record in records(log, "step")) for name in ("tokens", "labels"))
    return TuningArithmetic(**fields).share(labels / tokens if tokens else 0.0, whole_blocks=method == "full")


def _placement(split: Mapping[str, Any]) -> str:
    """The split in the paper's notation: bottom, emulator and top blocks, with trained emulator blocks in brackets."""
    inside = range(split["bottom"], split["bottom"] + split["emulator"])
    runs = [(trains, len(list(run))) for trains, run in groupby(place in split.get("spread", ()) for place in inside)]
    middle = [f"({blocks})" if trains else str(blocks) for trains, blocks in runs]
    return "-".join((str(split["bottom"]), *middle, str(split["top"])))


def _peaks(spent: Sequence[Spent]) -> dict[str, int]:
    """The largest peak memory of each party's stages, in bytes; a party without a measurement is left out."""
    peaks = {
        party: [one.peak_bytes for one in spent if one.party == party and one.peak_bytes is not None]
        for party in (OWNER, TUNER)
    }
    return {party: max(found) for party, found in peaks.items() if found}


def _error(stage: Stage, folder: Path) -> str | None:
    """The recorded error of a scoring stage, or of a stage that it needs; None if none of them failed."""
    for one in with_prerequisites(stage):
        if error := read_record(folder, one).get("error"):
            return str(error)
    return None
