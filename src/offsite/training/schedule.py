"""The number of steps of a run, the rows of each step, and the learning rate of each step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from offsite.config import TuneSpec
from offsite.errors import UsageError

_ROUNDING = 1e-9  # of steps: 0.07 * 100 is a bit more than 7


def step_count(spec: TuneSpec, rows: int) -> int:
    """The number of optimiser steps: `max_steps` if set, else `epochs` passes over the rows, rounded up."""
    return spec.length.max_steps or max(
        1, math.ceil(spec.length.epochs * math.ceil(rows / spec.length.batch_size) - _ROUNDING)
    )


def checkpoint_steps(spec: TuneSpec, steps: int) -> tuple[int, ...]:
    """The steps after which checkpoints are saved: evenly spaced over the run; the last one is the last step.

    Raises:
        UsageError: the run has fewer steps than checkpoints.
    """
    if spec.points.checkpoints > steps:
        raise UsageError(
            f"{spec.points.checkpoints} checkpoints were asked for, but the run has {steps} steps",
            next_step="ask for fewer with --checkpoints, or tune for longer",
        )
    return tuple(
        math.ceil(steps * number / spec.points.checkpoints) for number in range(1, spec.points.checkpoints + 1)
    )


def rows_of_steps(order: Callable[[int], Sequence[Sequence[int]]]) -> Callable[[int], tuple[int, Sequence[int]]]:
    """A function from a step (from 0) to its epoch and its rows. The result does not depend on earlier calls.

    Args:
        order: from an epoch (from 0) to the rows of each of its steps; all epochs have the same number of steps.
    """
    cached = functools.lru_cache(maxsize=2)(order)  # two: the rows of the next step may be of the next epoch
    per_epoch = len(cached(0))
    return lambda step: (step // per_epoch, cached(step // per_epoch)[step % per_epoch])


def learning_rate(
    step: int, steps: int, *, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"] = "cosine"
) -> float:
    """The learning rate of one step: linear warm-up to the peak, then cosine or linear decay to 0, or constant.

    Args:
        step: the step, from 0.
        steps: number of steps of the entire run.
        peak: the rate after warm-up.
        warmup: share of the steps that warm up, 0 to 1.
        schedule: the form of the decay after warm-up.
    """
    warming = round(warmup * steps)
    if step < warming:
        return peak * (step + 1) / warming
    passed = (step - warming) / max(1, steps - warming)
    shape = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return peak * shape[schedule]
