"""Fits a tuning into a memory budget by measuring its own micro-batches before the first step.

Starting with a part of the longest row, the number of tokens at once is doubled while the measured peak of the process
leaves room for twice as many; so the measurement itself does not exceed the budget. If the longest row does not fit
with several micro-batches side by side, they run one at a time. If it still does not fit, blocks are recomputed in the
backward pass. If that does not fit either, the tuning is refused, and the error says how much memory it needs.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offsite.config import TuneSpec
from offsite.data_owner.memory_trials import Trial, describe_longest_row, memory_trials
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import StorageError, UsageError
from offsite.kernels import Piece, checkpoint_activations, count_side_by_side, keep_activations, micro_batch_runner
from offsite.kernels.activation_checkpointing import Checkpointed
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import Runtime, keep_random_state
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file
from offsite.storage.leftovers import delete_command
from offsite.storage.strict_json import strict_json
from offsite.training.processes import Processes

_SPARE = 0.05  # share of the budget that stays free, for fragmentation of the heap over many steps
_SHAPES = 32 * 2**20  # bytes for compiled products of shapes that no trial had, and for fragmentation between them
_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Fit:
    """The settings that fit into the memory budget. They are saved, so that a resumed run uses the same."""

    at_once: int  # most tokens of a micro-batch
    lanes: int  # micro-batches that run side by side
    recompute: bool  # whether blocks are recomputed in the backward pass
    bytes: int  # expected peak memory of the process


@dataclass(frozen=True)
class Fitted:
    """The final settings of a tuning, and the entries for the report of the kernels that explain them."""

    spec: TuneSpec
    pieces: tuple[Piece, ...]


def within_memory(tuning: Tuning, spec: TuneSpec, runtime: Runtime, file: Path, progress: Progress) -> Fitted:
    """Find the settings with as many tokens at once as the memory permits; blocks are recomputed only if necessary.

    With several processes each measures its own device, and all get the settings that fit on every one.

    Args:
        tuning: the tuning; it is not changed, except that its blocks may be wrapped to be recomputed.
        spec: the settings with the memory budget and the largest number of tokens at once.
        runtime: the device and dtype.
        file: the result is saved here by the first process, so that a resumed run has the same settings.
        progress: receives the progress events.

    Returns:
        The settings, and for the report of the kernels how micro-batches run and whether activations are recomputed.

    Raises:
        UsageError: not even the longest row fits, or this system does not report a process's memory.
        StorageError: `file` cannot be written or read.
    """
    _recompute(tuning, spec.memory.gradient_checkpointing)
    parallel = side_by_side(tuning, spec, runtime)
    if spec.memory.budget is None:
        asked = "asked for" if spec.memory.gradient_checkpointing else "not asked for"
        return Fitted(_shared(spec, parallel.count), (parallel, _recomputed(tuning, asked)))
    found = _load_or_make(file, lambda: _fit(tuning, spec, parallel.count, runtime, progress), tuning.processes)
    _recompute(tuning, found.recompute)
    if found.lanes < parallel.count:
        parallel = replace(parallel, count=found.lanes, reason="the memory budget has no room for more")
    why = "the memory budget has no room for them" if found.recompute else "the memory budget has room for them"
    fitted = spec.changed({"micro_batch_tokens": found.at_once, "lanes": found.lanes})
    return Fitted(fitted, (parallel, _recomputed(tuning, why)))


def _recomputed(tuning: Tuning, reason: str) -> Piece:
    """The entry for the report of the kernels: how many blocks are recomputed in the backward pass, and why."""
    blocks = list(tuning.blocks.children())
    return Piece("recomputed activations", sum(isinstance(block, Checkpointed) for block in blocks), reason)


def side_by_side(tuning: Tuning, spec: TuneSpec, runtime: Runtime) -> Piece:
    """Decide how many micro-batches of a tuning run side by side (in threads), and give the reason."""
    task = tuning.task
    body, only_one = (task.network.body, "") if isinstance(task, TextTask) else (tuning.blocks, "pictures gain nothing")
    only_one = "each would hold a gradient as large as the head" if spec.adapter.tune_head else only_one
    only_one = "blocks are shared among processes" if tuning.sharded else only_one

    def sample() -> None:
        assert isinstance(task, TextTask)
        for block in tuning.trained:
            block.train()
        task.loss([min(range(task.rows), key=lambda row: len(task.examples[row].ids))], 0)

    return count_side_by_side(body, runtime.dtype, asked=spec.memory.lanes, sample=sample, only_one=only_one)


def _shared(spec: TuneSpec, lanes: int) -> TuneSpec:
    """The settings for `lanes` micro-batches side by side, each with an equal share of the tokens."""
    return spec.changed({"micro_batch_tokens": max(1, spec.tokens_at_once // lanes), "lanes": lanes})


def _recompute(tuning: Tuning, again: bool) -> None:
    """Recompute the blocks in the backward pass if `again`, otherwise store their activations."""
    (checkpoint_activations if again else keep_activations)(tuning.blocks)


def _fit(tuning: Tuning, spec: TuneSpec, lanes: int, runtime: Runtime, progress: Progress) -> Fit:
    """Measure memory with more and more tokens, and return the largest settings that fit into the budget.

    `lanes` micro-batches run side by side if memory permits it, else one at a time.

    Raises:
        UsageError: not even the longest row fits.
    """
    budget = _parse(str(spec.memory.budget))
    trained = sum(master.numel() for master in tuning.weights.masters.values())
    later = trained * (8 if runtime.dtype == torch.float32 else 12) + _SHAPES  # AdamW's moments, and gradients in fp32
    ceiling = int(budget * (1 - _SPARE)) - later
    least = 0.0
    ways = itertools.product(
        (True,) if spec.memory.gradient_checkpointing else (False, True), sorted({lanes, 1}, reverse=True)
    )
    for again, count in ways:
        _recompute(tuning, again)
        found = None
        trials = list(memory_trials(tuning.task, _shared(spec, count)))
        for trial, following in itertools.zip_longest(trials, trials[1:]):
            reported = trial.tokens if isinstance(tuning.task, TextTask) else len(trial.micro_batches[0])
            times = f"{count} times " if count > 1 else ""
            progress(Event(f"measuring memory: {times}{reported} {tuning.task.unit} at once", 0))
            before, peak = peak_memory(partial(run_trial, tuning, trial, count), runtime.device)
            least = _expected(before, peak, max(1.0, trial.longest / trial.tokens))
            if peak <= ceiling and trial.tokens >= trial.longest:
                found = Fit(trial.at_once, count, again, peak + later)
            ahead = _expected(before, peak, following.tokens / trial.tokens) if following is not None else 0.0
            if max(peak, ahead) > ceiling:
                break
        if found is not None:
            return found
    what, otherwise = describe_longest_row(tuning.task)
    raise UsageError(
        f"the tuning does not fit into {spec.memory.budget}",
        reasons=[f"{what} alone takes {_shown(least + later)}"],
        next_step=f"give --memory {_shown((least + later) / (1 - _SPARE) + 2**20)} or more{otherwise}",
    )


def _expected(before: int, peak: int, times: float) -> float:
    """The expected peak in bytes of a trial that is `times` as large as a measured one.

    Args:
        before: bytes in use before the measured trial.
        peak: bytes at its peak.
        times: the factor.
    """
    return before + (peak - before) * times


def run_trial(tuning: Tuning, trial: Trial, lanes: int) -> None:
    """Run a trial forward and backward, with `lanes` copies of each micro-batch side by side.

    Gradients are deleted and random states restored.
    """
    for block in tuning.trained:
        block.train()
    working = tuning.weights.working.values()
    with (
        keep_random_state(tuning.task.device),  # dropout in the run draws the same numbers as without the trial
        micro_batch_runner(working, tuning.task.device, lanes) as run,
    ):
        for group in trial.micro_batches:
            for _ in run(lambda rows: trial.task.loss(rows, 0), [group] * lanes):
                for parameter in working:
                    parameter.grad = None


def _parse(size: str) -> int:
    """A size in bytes from a text such as "6GiB"."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]+)", size).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _load_or_make(file: Path, make: Callable[[], Fit], processes: Processes) -> Fit:
    """Load the settings that an interrupted run saved in `file`; if there is no file, make them and save them.

    With several processes, the settings that are made fit into the memory of each.

    Raises:
        StorageError: the file cannot be written, or is damaged.
    """
    saved: dict[str, Any] | None = None
    own: Fit | None = None
    with processes.together():
        if processes.first and file.exists():
            saved = vars(_load(file))
    saved = processes.from_first(saved)
    if saved is not None:
        return Fit(**saved)
    with processes.together():
        own = make()
    assert own is not None
    fits = [Fit(**fit) for fit in processes.gather(vars(own))]
    found = Fit(
        at_once=min(fit.at_once for fit in fits),
        lanes=min(fit.lanes for fit in fits),
        recompute=any(fit.recompute for fit in fits),
        bytes=max(fit.bytes for fit in fits),
    )
    with processes.together():
        if processes.first:
            replace_file(file, json.dumps(vars(found)).encode(), mode=0o600)
    return found


def _load(file: Path) -> Fit:
    """Load the settings that an interrupted run saved.

    Raises:
        StorageError: the file is damaged.
    """
    try:
        return Fit(**strict_json(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot read {file}",
            reasons=[str(error)],
            next_step=f"remove the run and start again: {delete_command([file.parent])}",
        ) from None


def _shown(size: float) -> str:
    """A size in bytes as text in MiB, such as "512MiB", as the setting `memory` accepts it."""
    return f"{size / 2**20:.0f}MiB"
