"""The settings of the training loop, for every kind of task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunNames:
    """What a run and its events are called in error messages, progress events and the log."""

    noun: str = "tuning"
    stage: str = "tuning"  # name of the stage in progress events
    start: str = "start"  # this and the next three: names of events in the log
    resume: str = "resume"
    step: str = "step"
    validation: str = "validation"
    advice: str = "lower --lr; if it happens at the first step, the bundle's weights or the rows are odd"


@dataclass(frozen=True)
class LoopSettings:
    """The number of steps, the learning rates, and when a run is validated and saved."""

    steps: int  # optimiser steps in all
    learning_rate: Callable[[int], float]  # from the number of a step (from 0) to its learning rate
    weight_decay: float
    max_grad_norm: float
    save_every: int  # steps between resume points
    validates_after: Callable[[int], bool]  # whether the run is validated after this number of steps
    side_by_side: int = 1  # micro-batches that run side by side
    lockstep: bool = False  # whether all processes of a run must run equally many micro-batches
    names: RunNames = field(default_factory=RunNames)


def _nothing(*_: Any) -> None:
    """The default hook, which does nothing."""


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls when a run starts or resumes, after each step and after each validation."""

    on_start: Callable[[int], None] = _nothing  # takes the number of steps done before this start
    on_step: Callable[[int], None] = _nothing  # takes the number of steps done; runs before the resume point is written
    on_validation: Callable[[int, Mapping[str, float]], None] = _nothing  # takes the number of steps done, the metrics
