"""The schedule of a run: its number of steps, and the rows and the learning rate of each step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from offsite.config import TuneSpec
from offsite.errors import UsageError

FEW_STEPS = 20  # fewer steps than these, the warm-up included, hardly change a model
_ROUNDING = 1e-9  # in steps; in floating point 0.07 * 100 is slightly more than 7


def step_count(spec: TuneSpec, rows: int) -> int:
    """The number of optimiser steps of a tuning with `rows` training rows.

    It is the setting `max_steps`, or if that is not set `epochs` passes over the rows, rounded up.
    """
    return spec.length.max_steps or max(
        1, math.ceil(spec.length.epochs * math.ceil(rows / spec.length.batch_size) - _ROUNDING)
    )


def describe_few_steps(spec: TuneSpec, steps: int, rows: int) -> str | None:
    """A sentence about a run that is too short to learn much; None if it is long enough, or its length was asked for.

    Args:
        spec: the settings of the tuning.
        steps: the number of steps of the run.
        rows: the number of training rows.
    """
    if steps >= FEW_STEPS or spec.length.max_steps is not None:
        return None
    epochs, per_epoch = spec.length.epochs, math.ceil(rows / spec.length.batch_size)
    enough = math.ceil(FEW_STEPS / per_epoch)
    of = f"{rows:,} rows, {spec.length.batch_size} in a step, epochs = {epochs:g}"
    smaller = " or a smaller --batch-size" if spec.length.batch_size > 1 else ""
    return (
        f"{steps} {'step is' if steps == 1 else 'steps are'} few ({of}), so the model will hardly change; "
        f"--epochs {enough}{smaller} trains longer"
    )


def checkpoint_steps(spec: TuneSpec, steps: int) -> tuple[int, ...]:
    """The numbers of finished steps after which a tuning saves checkpoints: evenly spaced, the last one at the end.

    Args:
        spec: the settings of the tuning.
        steps: the number of steps of the run.

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
    """Make a function that takes the number of a step (from 0) and returns its epoch and its rows.

    The result for a step does not depend on earlier calls.

    Args:
        order: takes an epoch (from 0) and returns the rows of each of its steps; all epochs have the same number of
            steps.
    """
    cached = functools.lru_cache(maxsize=2)(order)  # 2, since the next step may belong to the next epoch
    per_epoch = len(cached(0))
    return lambda step: (step // per_epoch, cached(step // per_epoch)[step % per_epoch])


def learning_rate(
    step: int, steps: int, *, peak: float, warmup: float, schedule: Literal["cosine", "linear", "constant"] = "cosine"
) -> float:
    """The learning rate of one step: linear warm-up to the peak, then cosine or linear decay to 0, or a constant rate.

    Args:
        step: the number of the step, from 0.
        steps: the number of steps of the entire run.
        peak: the rate after the warm-up.
        warmup: the share of the steps that warm up, 0 to 1.
        schedule: the form of the rate after the warm-up.
    """
    warming = round(warmup * steps)
    if step < warming:
        return peak * (step + 1) / warming
    passed = (step - warming) / max(1, steps - warming)
    shape = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return peak * shape[schedule]
