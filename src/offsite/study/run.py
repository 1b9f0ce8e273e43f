"""Running a study: the stages that its cells need, each once, in an order that gives partial results early.

What was done stands in `stages/KEY.json`. A stage is asked for by what needs it, so a large model that was removed
after scoring is made again only if another score wants it.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offsite.errors import OffsiteError
from offsite.evaluation.row_scores import Measure
from offsite.storage.files import replace_file
from offsite.study.chain import over_the_wire, remove
from offsite.study.command import Outcome, Words, run_command, settings_toml
from offsite.study.grid import Cell
from offsite.study.metric import PRIMARIES
from offsite.study.stages import Lab, Stage, before, command_words

RunStage = Callable[[Words, Path], Outcome]  # words after `offsite`, and a file for what the command says


@dataclass(frozen=True)
class News:
    """What a study just began or got: a stage, or a row of a cell."""

    what: Literal["stage", "score", "failure"]
    done: int  # stages
    total: int
    says: str
    cell: int = -1  # index, of a row
    row: str = ""
    score: float | None = None
    measure: Measure = "loss"  # of the score
    log: Path | None = None  # what the running stage says

    @property
    def shown(self) -> str:
        """The score with its measure, for a person."""
        primary = PRIMARIES[self.measure]
        return "" if self.score is None else f"{primary.name} {primary.shown(self.score)}"


Tell = Callable[[News], None]


def run_in_process_of_its_own(words: Words, log: Path) -> Outcome:
    """The way stages run: one process each, so that the operating system measures each alone."""
    return run_command(words, "the study", log)


@dataclass
class Runner:
    """Runs stages, and remembers them on disk."""

    lab: Lab
    tell: Tell
    total: int
    run: RunStage = run_in_process_of_its_own
    failures: dict[str, OffsiteError] = field(default_factory=dict)  # by stage key, of this run
    _passed: set[str] = field(default_factory=set)

    @property
    def done(self) -> int:
        """Stages that are done, or need not be."""
        return len(self._passed)

    def made(self, stage: Stage) -> Mapping[str, Any]:
        """Have what a stage makes on the disk, running it and what it needs if it is not there yet.

        Returns:
            The stage's record.

        Raises:
            OffsiteError: it failed, now or earlier in this run, or a stage before it did.
        """
        record = read_record(self.lab.folder, stage)
        if record.get("done") and stage.out.exists():
            self._passed |= {one.key for one in before(stage)}
            return record
        if stage.key in self.failures:
            raise self.failures[stage.key]
        for need in stage.needs:
            self.made(need)
        found = self._run(stage)
        self._passed.add(stage.key)
        return found

    def _run(self, stage: Stage) -> Mapping[str, Any]:
        folder = self.lab.folder
        config, log = folder / stage.party / "settings" / f"{stage.key}.toml", folder / "logs" / f"{stage.key}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.tell(News("stage", self.done + 1, self.total, stage.says, log=log))
        if stage.settings:
            replace_file(config, settings_toml(stage.settings))
        remove(stage.out)  # of a run that was ended between making it and saying so
        try:
            if stage.copies is not None:
                over_the_wire(stage.copies, stage.out)
            outcome = self.run(command_words(stage, self.lab, config), log)
            _require_finite(stage, outcome)
        except OffsiteError as error:
            self.failures[stage.key] = error
            _write(folder, stage, {"done": False, "error": str(error), "exit_code": error.exit_code})
            raise
        measured = {"seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes}
        record = {"done": True, **measured, "result": outcome.result}
        _write(folder, stage, record)
        return record

    def forget_models(self, stages: Sequence[Stage]) -> None:
        """Remove the whole models that stages made; their records stay."""
        for stage in stages:
            if stage.large and (stage.out / "config.json").exists():
                going = stage.out.with_name(f"{stage.out.name}.removed")  # half a model must not pass for a whole one
                remove(going)
                stage.out.rename(going)
                shutil.rmtree(going)


def run_cells(cells: Sequence[Cell], runner: Runner, *, keep_models: bool = True) -> int:
    """Run every cell; one that fails is told and recorded, and the others go on.

    Returns:
        How many cells have a row that failed.
    """
    failed = 0
    for index, cell in enumerate(cells):
        broken = False
        for row, stage in cell.rows.items():
            try:
                score = float(runner.made(stage)["result"][cell.primary])
            except OffsiteError as error:
                broken = True
                runner.tell(News("failure", runner.done, runner.total, error.what, index, row))
                continue
            runner.tell(News("score", runner.done, runner.total, stage.says, index, row, score, cell.primary))
        failed += broken
        if not keep_models and not broken:
            with contextlib.suppress(OSError):  # they only take room
                runner.forget_models([one for stage in cell.rows.values() for one in before(stage)])
    return failed


def stages_of(cells: Sequence[Cell]) -> dict[str, Stage]:
    """Every stage of the cells once, by key, in the order in which they run."""
    return {one.key: one for cell in cells for stage in cell.rows.values() for one in before(stage)}


def record_file(folder: Path, stage: Stage) -> Path:
    """Where a stage's record lies."""
    return folder / "stages" / f"{stage.key}.json"


def read_record(folder: Path, stage: Stage) -> dict[str, Any]:
    """What is known of a stage: {} before it first ran, `done` with its result, or its `error`."""
    try:
        record = json.loads(record_file(folder, stage).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _require_finite(stage: Stage, outcome: Outcome) -> None:
    """A model that diverged has no loss to compare; JSON has null in its place."""
    if stage.name == "eval" and outcome.result.get("loss") is None:
        raise OffsiteError(
            f"{stage.says}: its loss on the test rows is not a finite number",
            next_step="the model diverged: try a lower learning rate, or a compressor that keeps more",
        )


def _write(folder: Path, stage: Stage, record: Mapping[str, Any]) -> None:
    described = {"stage": stage.name, "party": stage.party, "out": str(stage.out.relative_to(folder))}
    needs = [need.key for need in stage.needs]
    content = {**described, "needs": needs, "settings": stage.settings, **record}
    replace_file(record_file(folder, stage), json.dumps(content, indent=1).encode())
