"""How many steps a tuning has, which rows each step sees, and the learning rate of each."""

import functools
import math
from collections.abc import Callable

from offsite.config import TuneSpec
from offsite.errors import UsageError

_ROUNDING = 1e-9  # of steps: 0.07 * 100 is a bit more than 7


def step_count(spec: TuneSpec, rows: int) -> int:
    """Optimiser steps in all: `max_steps`, else `epochs` passes over the rows, rounded up."""
    return spec.length.max_steps or max(
        1, math.ceil(spec.length.epochs * math.ceil(rows / spec.length.batch_size) - _ROUNDING)
    )


def checkpoint_steps(spec: TuneSpec, steps: int) -> tuple[int, ...]:
    """The steps after which checkpoints are taken: evenly spaced over the run, the last step among them.

    Raises:
        UsageError: the run has fewer steps than checkpoints.
    """
    if spec.points.checkpoints > steps:
        raise UsageError(
            f"{spec.points.checkpoints} checkpoints were asked for, of a run of {steps} steps",
            next_step="ask for fewer with --checkpoints, or tune for longer",
        )
    return tuple(
        math.ceil(steps * number / spec.points.checkpoints) for number in range(1, spec.points.checkpoints + 1)
    )


def rows_of_steps(
    spec: TuneSpec, rows: int, order: Callable[[int, int, int], list[list[int]]]
) -> Callable[[int], tuple[int, list[int]]]:
    """A function from a step (from 0) to its epoch and its rows; it depends on nothing that ran before.

    Args:
        spec: rows in a step, and the seed.
        rows: how many there are.
        order: from those and an epoch to the rows of every step of it.
    """
    per_epoch = math.ceil(rows / spec.length.batch_size)

    @functools.lru_cache(maxsize=1)
    def of_epoch(epoch: int) -> list[list[int]]:
        return order(spec.length.batch_size, spec.seed, epoch)

    return lambda step: (step // per_epoch, of_epoch(step // per_epoch)[step % per_epoch])


def learning_rate(spec: TuneSpec, step: int, steps: int) -> float:
    """The rate of one step (from 0): linear warm-up to the peak, then cosine or linear to 0, or constant."""
    warmup = round(spec.optimizer.warmup * steps)
    if step < warmup:
        return spec.peak_lr * (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return spec.peak_lr * shape[spec.optimizer.schedule]
