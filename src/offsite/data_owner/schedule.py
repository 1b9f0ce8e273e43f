"""How many steps a tuning has, which rows each step sees, and the learning rate of each."""

import functools
import math
from collections.abc import Callable, Sequence

from offsite.config import TuneSpec
from offsite.core.data import Example, step_batches


def step_count(spec: TuneSpec, rows: int) -> int:
    """Optimiser steps in all: `max_steps`, else `epochs` passes over the rows, rounded up."""
    return spec.max_steps or max(1, math.ceil(spec.epochs * math.ceil(rows / spec.batch_size)))


def rows_of_steps(spec: TuneSpec, examples: Sequence[Example]) -> Callable[[int], list[int]]:
    """A function from a step (from 0) to its rows; it depends on nothing that ran before."""
    per_epoch = math.ceil(len(examples) / spec.batch_size)

    @functools.lru_cache(maxsize=1)
    def of_epoch(epoch: int) -> list[list[int]]:
        return step_batches(examples, rows=spec.batch_size, seed=spec.seed, epoch=epoch)

    return lambda step: of_epoch(step // per_epoch)[step % per_epoch]


def learning_rate(spec: TuneSpec, step: int, steps: int) -> float:
    """The rate of one step (from 0): linear warm-up to the peak, then cosine or linear to 0, or constant."""
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return spec.peak_lr * (step + 1) / warmup
    passed = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
    return spec.peak_lr * shape[spec.schedule]
