"""Settings of the training loop, for any task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunNames:
    """The words for a run in error messages, progress events and the log."""

    noun: str = "tuning"
    stage: str = "tuning"  # in the progress
    start: str = "start"  # events in the log
    resume: str = "resume"
    step: str = "step"
    validation: str = "validation"
    advice: str = "lower --lr; if it happens at the first step, the bundle's weights or the rows are odd"


@dataclass(frozen=True)
class LoopSettings:
    """The length of training, the learning rates, and what happens between steps."""

    steps: int  # optimiser steps in all
    learning_rate: Callable[[int], float]  # of a step, from 0
    weight_decay: float
    max_grad_norm: float
    save_every: int  # steps between resume points
    validates_after: Callable[[int], bool]  # whether there is a validation after so many steps
    side_by_side: int = 1  # micro-batches that run side by side
    names: RunNames = field(default_factory=RunNames)


def _nothing(*_: Any) -> None:
    """The default hook; does nothing."""


@dataclass(frozen=True)
class Hooks:
    """Functions that the loop calls at a start, after a step and after a validation."""

    on_start: Callable[[int], None] = _nothing  # with the number of steps that were done before
    on_step: Callable[[int], None] = _nothing  # before a resume point of this step can be written
    on_validation: Callable[[int, Mapping[str, float]], None] = _nothing  # with the step and its figures
