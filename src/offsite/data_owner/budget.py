"""Fitting a tuning into a memory budget: measured on the rows themselves before the first step, never guessed.

What runs at once is doubled from a single row on, as long as the process's measured peak leaves room for twice as much.
Where not even the longest row of each lane fits, there is one lane; where that does not fit, blocks are recomputed in
the backward pass; and where that does not fit either, the tuning is refused with what it would need.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from offsite.config import TuneSpec
from offsite.core.checkpoint import strict_json
from offsite.core.data import Example
from offsite.core.lanes import Lanes
from offsite.core.picture_sizes import at_once
from offsite.core.progress import Event, Progress
from offsite.core.runtime import Runtime
from offsite.core.storage import replace_file
from offsite.data_owner.image_task import ImageTask
from offsite.data_owner.lanes import lane_count
from offsite.data_owner.recompute import keep_activations, recompute
from offsite.data_owner.task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import StorageError, UsageError

_LEAST = 256  # tokens at once; fewer cost speed and save next to nothing
_SPARE = 0.05  # share of the budget that stays free: heaps get holes over many steps
_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Fit:
    """What fits: tokens of a micro-batch, how many run side by side, whether blocks are recomputed; and the peak."""

    at_once: int
    lanes: int
    recompute: bool
    bytes: int


def within_memory(tuning: Tuning, spec: TuneSpec, where: Runtime, file: Path, progress: Progress) -> TuneSpec:
    """The settings with as many tokens at once as the memory permits; blocks are recomputed where they must be.

    Args:
        tuning: what will train; nothing of it changes but whether its blocks are recomputed.
        spec: `memory`, and the most tokens at once.
        where: the device and dtype.
        file: keeps what was found, so that an interrupted run goes on bit for bit.
        progress: where the events go.

    Raises:
        UsageError: not even the longest row fits, or this system does not say what a process holds.
        StorageError: `file` cannot be written or read.
    """
    _recompute(tuning, spec.gradient_checkpointing)
    lanes = lane_count(tuning, spec, where)
    if spec.memory is None:
        return _shared(spec, lanes)
    found = _settled(file, lambda: _fit(tuning, spec, lanes, where, progress))
    _recompute(tuning, found.recompute)
    return spec.model_copy(update={"micro_batch_tokens": found.at_once, "lanes": found.lanes})


def _shared(spec: TuneSpec, lanes: int) -> TuneSpec:
    """The settings of one lane: its share of the tokens."""
    return spec.model_copy(update={"micro_batch_tokens": max(1, spec.micro_batch_tokens // lanes), "lanes": lanes})


def _recompute(tuning: Tuning, again: bool) -> None:
    (recompute if again else keep_activations)(tuning.blocks)


def _fit(tuning: Tuning, spec: TuneSpec, lanes: int, where: Runtime, progress: Progress) -> Fit:
    budget = _parse(str(spec.memory))
    numbers = sum(master.numel() for master in tuning.weights.masters.values())
    later = numbers * (8 if where.dtype == torch.float32 else 12)  # AdamW's moments, and gradients in fp32
    ceiling = int(budget * (1 - _SPARE)) - later
    least = 0
    ways = itertools.product(
        (True,) if spec.gradient_checkpointing else (False, True), sorted({lanes, 1}, reverse=True)
    )
    for again, beside in ways:
        _recompute(tuning, again)
        found = None
        for count, group in _trials(tuning, _shared(spec, beside)):
            told = count if isinstance(tuning.task, TextTask) else len(group)
            times = f"{beside} times " if beside > 1 else ""
            progress(Event(f"measuring memory: {times}{told} {tuning.task.unit} at once", 0))
            before, peak = _measured(partial(_run, tuning, group, beside), where.device)
            if peak > ceiling:
                least = peak  # of one row alone, where nothing was found
                break
            found = Fit(count, beside, again, peak + later)
            if peak + (peak - before) > ceiling:
                break
        if found is not None:
            return found
    what, otherwise = _one_row(tuning)
    if where.dtype == torch.float32 and not spec.narrow_weights:
        otherwise += ", or narrow_weights = true in table [tune] of a --config file"
    raise UsageError(
        f"the tuning does not fit into {spec.memory}",
        reasons=[f"{what} alone takes {_shown(least + later)}"],
        next_step=f"give --memory {_shown(int((least + later) / (1 - _SPARE)) + 2**20)} or more{otherwise}",
    )


def _trials(tuning: Tuning, spec: TuneSpec) -> Iterator[tuple[int, Sequence[int]]]:
    """More and more rows at once, up to what the settings permit: how many tokens, and which rows."""
    if isinstance(tuning.task, TextTask):
        examples = tuning.task.examples
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
        yield from _doubling(examples, order, spec.micro_batch_tokens)
        return
    assert isinstance(tuning.task, ImageTask)
    tokens = tuning.task.album.tokens  # pictures are all of one size
    most, count = min(at_once(tokens, spec.micro_batch_tokens), spec.batch_size, tuning.task.rows), 1
    while count < most:
        yield count * tokens, range(count)
        count *= 2
    yield most * tokens, range(most)


def _one_row(tuning: Tuning) -> tuple[str, str]:
    """What the longest row is, and what to do about it beside giving more memory."""
    if not isinstance(tuning.task, TextTask):
        return "one picture", ", or a bundle with fewer trained blocks"
    longest = max(len(example.ids) for example in tuning.task.examples)
    return f"its longest row ({longest} tokens)", ", or cut the rows: --max-length with --long-rows truncate"


def _run(tuning: Tuning, rows: Sequence[int], lanes: int) -> None:
    """A forward and backward pass in every lane that leaves nothing behind."""
    for block in tuning.trained:
        block.train()
    with torch.random.fork_rng(devices=[]), Lanes(lanes) as side_by_side:  # dropout will draw as without the trial
        for _ in side_by_side.run_seeded(
            lambda group: tuning.weights.gradients(tuning.task.loss(group, 0, 0)), [rows] * lanes
        ):
            pass


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


def _doubling(examples: Sequence[Example], order: Sequence[int], most: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Budgets of tokens, each with the longest rows that fill it; the longest row alone is the least."""
    width = len(examples[order[0]].ids)
    tokens = max(_LEAST, width)
    while True:
        tokens = min(tokens, max(most, width))
        everything = tokens // width >= len(order)
        yield max(tokens, most) if everything else tokens, order[: max(1, tokens // width)]
        if everything or tokens >= most:
            return
        tokens *= 2


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
    reset.write_text("5")  # the peak starts anew from here
    before = _kilobytes(status, "VmRSS")
    work()
    return before, _kilobytes(status, "VmHWM")


def _kilobytes(status: Path, key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+)", status.read_text(), re.MULTILINE)[1]) * 1024  # type: ignore[index]


def _shown(size: int) -> str:
    return f"{size / 2**20:.0f}MiB"
