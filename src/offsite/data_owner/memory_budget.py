"""Fitting a tuning into a memory budget: measured on the rows themselves before the first step, never guessed.

What runs at once is doubled, from a part of the longest row on, as long as the process's measured peak leaves room for
twice as much: so the budget holds while it is measured, too. What is tried are the fullest micro-batches of the first
epoch, as they will run. Where not even the longest row of each lane fits, there is one lane; where that does not fit,
blocks are recomputed in the backward pass; and where that does not fit either, the tuning is refused with what it would
need.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from offsite.config import TuneSpec
from offsite.data.picture_sizes import at_once
from offsite.data.tokens import Example
from offsite.data_owner.image_task import ImageTask
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import StorageError, UsageError
from offsite.kernels import Piece, checkpoint_activations, count_side_by_side, keep_activations, micro_batch_runner
from offsite.kernels.activation_checkpointing import Checkpointed
from offsite.kernels.runtime import Runtime, release_freed_memory
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import strict_json
from offsite.training.task import Batching

_LEAST = 256  # tokens at once; fewer cost speed and save next to nothing
_STEPS = 1000  # of the first epoch, among which the fullest micro-batches are looked for
_SPARE = 0.05  # share of the budget that stays free: heaps get holes over many steps
_SHAPES = 32 * 2**20  # what products of more shapes than were tried, compiled, and holes between them take
_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Fit:
    """What fits: tokens of a micro-batch, how many run side by side, whether blocks are recomputed; and the peak."""

    at_once: int
    lanes: int
    recompute: bool
    bytes: int


@dataclass(frozen=True)
class Fitted:
    """The settings that a tuning runs with, and what they are about in the report of the kernels."""

    spec: TuneSpec
    pieces: tuple[Piece, ...]


def within_memory(tuning: Tuning, spec: TuneSpec, runtime: Runtime, file: Path, progress: Progress) -> Fitted:
    """The settings with as many tokens at once as the memory permits; blocks are recomputed where they must be.

    Args:
        tuning: what will train; nothing of it changes but whether its blocks are recomputed.
        spec: `memory`, and the most tokens at once.
        runtime: the device and dtype.
        file: keeps what was found, so that an interrupted run goes on bit for bit.
        progress: where the events go.

    Returns:
        The settings, and for the report of the kernels how micro-batches run and whether activations are recomputed.

    Raises:
        UsageError: not even the longest row fits, or this system does not say what a process holds.
        StorageError: `file` cannot be written or read.
    """
    _recompute(tuning, spec.memory.gradient_checkpointing)
    beside = side_by_side(tuning, spec, runtime)
    if spec.memory.budget is None:
        asked = "asked for" if spec.memory.gradient_checkpointing else "not asked for"
        return Fitted(_shared(spec, beside.count), (beside, _recomputed(tuning, asked)))
    found = _settled(file, lambda: _fit(tuning, spec, beside.count, runtime, progress))
    _recompute(tuning, found.recompute)
    if found.lanes < beside.count:
        beside = replace(beside, count=found.lanes, reason="the memory budget has no room for more")
    why = "the memory budget has no room for them" if found.recompute else "the memory budget has room for them"
    fitted = spec.changed({"micro_batch_tokens": found.at_once, "lanes": found.lanes})
    return Fitted(fitted, (beside, _recomputed(tuning, why)))


def _recomputed(tuning: Tuning, reason: str) -> Piece:
    blocks = list(tuning.blocks.children())
    return Piece("recomputed activations", sum(isinstance(block, Checkpointed) for block in blocks), reason)


def side_by_side(tuning: Tuning, spec: TuneSpec, runtime: Runtime) -> Piece:
    """How many micro-batches of a tuning run side by side, and why."""
    task = tuning.task
    body, only_one = (task.network.body, "") if isinstance(task, TextTask) else (tuning.blocks, "pictures gain nothing")
    only_one = "each would hold a gradient as large as the head" if spec.adapter.tune_head else only_one

    def sample() -> None:
        assert isinstance(task, TextTask)
        for block in tuning.trained:
            block.train()
        task.loss([min(range(task.rows), key=lambda row: len(task.examples[row].ids))], 0)

    return count_side_by_side(body, runtime.dtype, asked=spec.memory.lanes, sample=sample, only_one=only_one)


def _shared(spec: TuneSpec, lanes: int) -> TuneSpec:
    """The settings of one lane: its share of the tokens."""
    return spec.changed({"micro_batch_tokens": max(1, spec.tokens_at_once // lanes), "lanes": lanes})


def _recompute(tuning: Tuning, again: bool) -> None:
    (checkpoint_activations if again else keep_activations)(tuning.blocks)


def _fit(tuning: Tuning, spec: TuneSpec, lanes: int, runtime: Runtime, progress: Progress) -> Fit:
    budget = _parse(str(spec.memory.budget))
    numbers = sum(master.numel() for master in tuning.weights.masters.values())
    later = numbers * (8 if runtime.dtype == torch.float32 else 12) + _SHAPES  # AdamW's moments, and gradients in fp32
    ceiling = int(budget * (1 - _SPARE)) - later
    least = 0.0
    ways = itertools.product(
        (True,) if spec.memory.gradient_checkpointing else (False, True), sorted({lanes, 1}, reverse=True)
    )
    for again, beside in ways:
        _recompute(tuning, again)
        found = None
        trials = list(_trials(tuning, _shared(spec, beside)))
        for trial, following in itertools.zip_longest(trials, trials[1:]):
            told = trial.tokens if isinstance(tuning.task, TextTask) else len(trial.groups[0])
            times = f"{beside} times " if beside > 1 else ""
            progress(Event(f"measuring memory: {times}{told} {tuning.task.unit} at once", 0))
            before, peak = _measured(partial(_run, tuning, trial, beside), runtime.device)
            least = _expected(before, peak, max(1.0, trial.longest / trial.tokens))
            if peak <= ceiling and trial.tokens >= trial.longest:
                found = Fit(trial.at_once, beside, again, peak + later)
            ahead = _expected(before, peak, following.tokens / trial.tokens) if following is not None else 0.0
            if max(peak, ahead) > ceiling:
                break
        if found is not None:
            return found
    what, otherwise = _one_row(tuning)
    raise UsageError(
        f"the tuning does not fit into {spec.memory.budget}",
        reasons=[f"{what} alone takes {_shown(least + later)}"],
        next_step=f"give --memory {_shown((least + later) / (1 - _SPARE) + 2**20)} or more{otherwise}",
    )


def _expected(before: int, peak: int, times: float) -> float:
    """The peak of so many times what was tried."""
    return before + (peak - before) * times


@dataclass(frozen=True)
class _Trial:
    """Micro-batches that are tried one after the other."""

    task: TextTask | ImageTask
    groups: Sequence[Sequence[int]]  # rows of each
    tokens: int  # of the fullest, with its padding
    longest: int  # of a row of the tuning
    at_once: int  # tokens of a micro-batch, if this fits


def _trials(tuning: Tuning, spec: TuneSpec) -> Iterator[_Trial]:
    """More and more at once, each about twice the one before, up to what the settings permit."""
    task = tuning.task
    if isinstance(task, TextTask):
        yield from _texts(task, spec)
        return
    assert isinstance(task, ImageTask)
    tokens = task.album.tokens  # pictures are all of one size
    most, count = min(at_once(tokens, spec.tokens_at_once), spec.length.batch_size, task.rows), 1
    while count < most:
        yield _Trial(task, [range(count)], count * tokens, tokens, count * tokens)
        count *= 2
    yield _Trial(task, [range(most)], most * tokens, tokens, most * tokens)


def _one_row(tuning: Tuning) -> tuple[str, str]:
    """What the longest row is, and what to do about it beside giving more memory."""
    if not isinstance(tuning.task, TextTask):
        return "one picture", ", or a bundle with fewer trained blocks"
    longest = max(len(example.ids) for example in tuning.task.examples)
    return (
        f"its longest row ({longest} tokens)",
        ', or cut the rows: a lower max_length with long_rows = "truncate", in table [tune] of a --config file',
    )


def _run(tuning: Tuning, trial: _Trial, lanes: int) -> None:
    """A forward and backward pass in every lane that leaves nothing behind."""
    for block in tuning.trained:
        block.train()
    working = tuning.weights.working.values()
    with (
        torch.random.fork_rng(devices=[]),  # dropout will draw as without the trial
        micro_batch_runner(working, tuning.task.device, lanes) as run,
    ):
        for group in trial.groups:
            for _ in run(lambda rows: trial.task.loss(rows, 0), [group] * lanes):
                for parameter in working:
                    parameter.grad = None


def _parse(size: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]+)", size).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _settled(file: Path, make: Callable[[], Fit]) -> Fit:
    """The fit that an interrupted run found, so that it goes on bit for bit; else `make` it and keep it."""
    if not file.exists():
        found = make()
        replace_file(file, json.dumps(vars(found)).encode())
        return found
    try:
        return Fit(**strict_json(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"cannot read {file}",
            reasons=[str(error)],
            next_step=f"remove the run and start anew: rm -r {file.parent}",
        ) from None


def _texts(task: TextTask, spec: TuneSpec) -> Iterator[_Trial]:
    """Of the longest row a part and twice that, until it is whole, then the fullest micro-batches of more and more."""
    longest = max(range(task.rows), key=lambda i: len(task.examples[i].ids))
    width = len(task.examples[longest].ids)
    tokens = _LEAST
    while tokens < width:
        yield _Trial(replace(task, examples=(_end_of(task.examples[longest], tokens),)), [[0]], tokens, width, tokens)
        tokens *= 2
    most = max(spec.tokens_at_once, width)
    steps = replace(task, batching=Batching.of(spec)).order(0)[:_STEPS]
    fullest: dict[tuple[tuple[int, ...], ...], int] = {}  # micro-batches, and the most tokens that give these
    tokens = max(_LEAST, width)
    while True:
        batching = replace(task.batching, tokens=min(tokens, most))
        cut = replace(task, batching=batching)
        groups = [*(tuple(group) for step in steps for group in cut.micro_batches(step)), (longest,)]
        by_tokens = max(groups, key=partial(_padded, task.examples))
        by_labels = max(groups, key=lambda group: sum(task.examples[i].labels for i in group))
        fullest[tuple(dict.fromkeys((by_tokens, by_labels)))] = batching.tokens
        if tokens >= most:
            break
        tokens *= 2
    for chosen, settled in fullest.items():
        yield _Trial(task, chosen, _padded(task.examples, chosen[0]), width, settled)


def _padded(examples: Sequence[Example], group: Sequence[int]) -> int:
    """Tokens of a micro-batch with its padding."""
    return len(group) * max(len(examples[i].ids) for i in group)


def _end_of(row: Example, tokens: int) -> Example:
    """The last tokens of a row, with their labels."""
    cut = len(row.ids) - tokens
    places = None if row.places is None else row.places[row.places > cut] - cut
    return replace(row, ids=row.ids[cut:], given=max(1, row.given - cut), places=places)


def _measured(work: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """Bytes that the process (or the device) held before, and at the peak of the work."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return before, torch.cuda.max_memory_reserved(device)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not reset.exists():
        raise UsageError(
            "--memory needs a system that says what a process holds: Linux, or a CUDA device",
            next_step="use --gradient-checkpointing, or a lower micro_batch_tokens in --config; --plan estimates",
        )
    release_freed_memory(device)  # or a trial would be charged what the one before it freed
    reset.write_text("5")  # the peak starts anew from here
    before = _kilobytes(status, "VmRSS")
    work()
    return before, _kilobytes(status, "VmHWM")


def _kilobytes(status: Path, key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+)", status.read_text(), re.MULTILINE)[1]) * 1024  # type: ignore[index]


def _shown(size: float) -> str:
    return f"{size / 2**20:.0f}MiB"
