"""Runs the stages that the points of a study's grid need, each once, in an order that gives partial results early.

The record of a stage is `stages/KEY.json`. A stage runs only when another one needs its output, so a large model that
was removed after scoring is computed again only if another score needs it.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offsite.errors import OffsiteError
from offsite.evaluation.row_scores import MetricName
from offsite.storage.files import replace_file
from offsite.study.grid import GridPoint
from offsite.study.metric import METRICS
from offsite.study.resumable_chain import copy_artifact, remove
from offsite.study.run_command import Outcome, Words, run_command, settings_toml
from offsite.study.stages import Stage, Workspace, command_words, with_prerequisites

RunStage = Callable[[Words, Path], Outcome]  # takes the words after `offsite`, and a file for the command's messages


@dataclass(frozen=True)
class StudyEvent:
    """An event of a running study: a stage began, or the score of a model of a grid point was computed or failed."""

    kind: Literal["stage", "score", "failure"]
    done: int  # number of stages that are done
    total: int
    description: str
    point: int = -1  # index of the grid point, for a score or a failure
    row: str = ""  # the model's row of the result table, such as "plug_in", for a score or a failure
    score: float | None = None
    metric: MetricName = "loss"  # of the score
    log: Path | None = None  # file with the messages of the running stage

    @property
    def score_text(self) -> str:
        """The name of the metric and the score, such as "loss 2.345"; empty if the event has no score."""
        metric = METRICS[self.metric]
        return "" if self.score is None else f"{metric.name} {metric.format(self.score)}"


OnStudyEvent = Callable[[StudyEvent], None]


def run_in_own_process(words: Words, log: Path) -> Outcome:
    """Run the command of a stage in its own process, so that its time and peak memory are measured alone."""
    return run_command(words, "the study", log)


@dataclass
class Runner:
    """Runs the stages of a study, and records on disk which of them are done."""

    workspace: Workspace
    on_event: OnStudyEvent
    total: int
    run: RunStage = run_in_own_process
    failures: dict[str, OffsiteError] = field(default_factory=dict)  # by stage key, of this run
    _passed: set[str] = field(default_factory=set)

    @property
    def done(self) -> int:
        """The number of stages that are done or were not needed."""
        return len(self._passed)

    def ensure_done(self, stage: Stage) -> Mapping[str, Any]:
        """Run a stage, and the stages that it needs, unless their outputs are on disk already.

        Returns:
            The stage's record.

        Raises:
            OffsiteError: the stage or one that it needs failed, now or earlier in this run.
        """
        record = read_record(self.workspace.folder, stage)
        if record.get("done") and stage.out.exists():
            self._passed |= {one.key for one in with_prerequisites(stage)}
            return record
        if stage.key in self.failures:
            raise self.failures[stage.key]
        for need in stage.needs:
            self.ensure_done(need)
        found = self._run(stage)
        self._passed.add(stage.key)
        return found

    def _run(self, stage: Stage) -> Mapping[str, Any]:
        """Run the command of a stage, and write its record.

        Raises:
            OffsiteError: the command failed; the record has the error.
        """
        folder = self.workspace.folder
        config, log = folder / stage.party / "settings" / f"{stage.key}.toml", folder / "logs" / f"{stage.key}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.on_event(StudyEvent("stage", self.done + 1, self.total, stage.description, log=log))
        if stage.settings:
            replace_file(config, settings_toml(stage.settings))
        remove(stage.out)  # left by a run that was interrupted after writing it and before recording it
        try:
            if stage.copies is not None:
                copy_artifact(stage.copies, stage.out)
            outcome = self.run(command_words(stage, self.workspace, config), log)
            _require_finite(stage, outcome)
        except OffsiteError as error:
            self.failures[stage.key] = error
            _write(folder, stage, {"done": False, "error": str(error), "exit_code": error.exit_code})
            raise
        measured = {"seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes}
        record = {"done": True, **measured, "result": outcome.result}
        _write(folder, stage, record)
        return record

    def remove_models(self, stages: Sequence[Stage]) -> None:
        """Remove the complete models that these stages wrote; the stages' records stay."""
        for stage in stages:
            if stage.large and (stage.out / "config.json").exists():
                removed = stage.out.with_name(
                    f"{stage.out.name}.removed"
                )  # a half-removed model must not look complete
                remove(removed)
                stage.out.rename(removed)
                shutil.rmtree(removed)


def run_grid(points: Sequence[GridPoint], runner: Runner, *, keep_models: bool = True) -> int:
    """Run every point of the grid. A failure is reported and recorded, and the other points still run.

    Args:
        points: the grid points.
        runner: runs and records the stages.
        keep_models: whether complete models remain on disk after they were scored.

    Returns:
        The number of grid points of which at least one score failed.
    """
    failed = 0
    for index, point in enumerate(points):
        broken = False
        for row, stage in point.rows.items():
            try:
                score = float(runner.ensure_done(stage)["result"][point.metric])
            except OffsiteError as error:
                broken = True
                runner.on_event(StudyEvent("failure", runner.done, runner.total, error.what, index, row))
                continue
            runner.on_event(
                StudyEvent("score", runner.done, runner.total, stage.description, index, row, score, point.metric)
            )
        failed += broken
        if not keep_models and not broken:
            with contextlib.suppress(OSError):  # a model that cannot be removed only takes disk space
                runner.remove_models([one for stage in point.rows.values() for one in with_prerequisites(stage)])
    return failed


def list_stages(points: Sequence[GridPoint]) -> dict[str, Stage]:
    """List every stage that the points need, each once, by key, in the order in which they run."""
    return {one.key: one for point in points for stage in point.rows.values() for one in with_prerequisites(stage)}


def record_file(folder: Path, stage: Stage) -> Path:
    """The path of the JSON file that records a stage."""
    return folder / "stages" / f"{stage.key}.json"


def read_record(folder: Path, stage: Stage) -> dict[str, Any]:
    """Read a stage's record: {} if it never ran, else a mapping with `done`, and with `result` or `error`."""
    try:
        record = json.loads(record_file(folder, stage).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _require_finite(stage: Stage, outcome: Outcome) -> None:
    """Raise an error for the score of a model that diverged; its loss is not finite, and null in the command's JSON."""
    if stage.name == "eval" and outcome.result.get("loss") is None:
        raise OffsiteError(
            f"{stage.description}: its loss on the test rows is not a finite number",
            next_step="the model diverged: try a lower learning rate, or a compressor that keeps more blocks",
        )


def _write(folder: Path, stage: Stage, record: Mapping[str, Any]) -> None:
    """Write the record of a stage: its description, settings and needed stages, and the values in `record`."""
    described = {"stage": stage.name, "party": stage.party, "out": str(stage.out.relative_to(folder))}
    needs = [need.key for need in stage.needs]
    content = {**described, "needs": needs, "settings": stage.settings, **record}
    replace_file(record_file(folder, stage), json.dumps(content, indent=1).encode())
