"""The interface between the training loop and a task, such as tuning on text or on pictures.

The loop itself does not know what a row of the data set holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offsite.config import TuneSpec
from offsite.progress import Progress


@dataclass(frozen=True)
class Batching:
    """How the rows of a data set are grouped into optimiser steps and micro-batches."""

    rows: int  # number of rows of an optimiser step
    tokens: int  # largest number of tokens (padding included) or patches of pictures in a micro-batch
    seed: int  # seed of the order of the rows and of the random crops of pictures

    @classmethod
    def of(cls, spec: TuneSpec) -> "Batching":
        """The grouping from the settings of a tuning."""
        return cls(spec.length.batch_size, spec.tokens_at_once, spec.seed)


class TrainingTask(Protocol):
    """A training data set whose rows are numbered from 0, and the functions that compute their loss.

    The loop may call `loss_terms` from several threads at once, and all other methods from one thread.
    """

    @property
    def unit(self) -> str:
        """The unit of the speed, such as "tokens"; it is one of the keys in the result of `size`."""
        ...

    @property
    def term_weights(self) -> Mapping[str, float]:
        """For each term of the loss, by name, its factor in the sum that training minimises."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        ...

    def order(self, epoch: int) -> Sequence[Sequence[int]]:
        """The row numbers of every step of an epoch (from 0).

        They depend only on the epoch, so a resumed run has the same rows.
        """
        ...

    def micro_batches(self, rows: Sequence[int]) -> Iterable[Sequence[int]]:
        """Cut the rows of a step into micro-batches."""
        ...

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Start to prepare rows for a later call of `loss_terms`, if there are worker processes for this."""
        ...

    def loss_terms(self, rows: Sequence[int], epoch: int) -> Mapping[str, torch.Tensor]:
        """Compute the terms of a micro-batch's loss, by name: scalars with a gradient.

        Each is summed over the tokens, pictures or batches that `weight` counts.
        """
        ...

    def weight(self, rows: Sequence[int]) -> int:
        """The divisor of the summed loss of a step: the number of labelled tokens, pictures or batches in its rows."""
        ...

    def size(self, rows: Sequence[int]) -> Mapping[str, int]:
        """The number of units, such as tokens, in the rows of a step, for the log, by the name of the unit."""
        ...

    def first_record(self) -> Mapping[str, float]:
        """Figures about the data, by name, for the first record of the log."""
        ...

    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Compute the metrics of the held-out rows, by name; empty if there are no held-out rows.

        Args:
            progress: receives the progress events.
            stage: the name of the stage in these events.
        """
        ...
