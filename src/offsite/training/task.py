"""The interface between the training loop and a task. The loop knows nothing of text, pictures or hidden states."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offsite.config import TuneSpec
from offsite.progress import Progress


@dataclass(frozen=True)
class Batching:
    """How rows are grouped into optimiser steps and micro-batches."""

    rows: int  # in an optimiser step
    tokens: int  # most padded tokens (of pictures: patches) in a micro-batch
    seed: int  # of the order of the rows, and of how pictures are cropped

    @classmethod
    def of(cls, spec: TuneSpec) -> "Batching":
        """The grouping that the settings of a tuning give."""
        return cls(spec.length.batch_size, spec.tokens_at_once, spec.seed)


class TrainingTask(Protocol):
    """Numbered rows (from 0), and how their loss is computed.

    `loss_terms` may be called from several threads at once; all other methods are called from one thread.
    """

    @property
    def unit(self) -> str:
        """The unit for speed, such as "tokens"; it is a key of the result of `size`."""
        ...

    @property
    def term_weights(self) -> Mapping[str, float]:
        """The factor of each term of the loss in the sum that is minimised, by the term's name."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        ...

    def order(self, epoch: int) -> Sequence[Sequence[int]]:
        """The rows of every step of an epoch. They depend only on the epoch (from 0), so a resumed run has the same."""
        ...

    def micro_batches(self, rows: Sequence[int]) -> Iterable[Sequence[int]]:
        """The rows of a step, cut into micro-batches."""
        ...

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Start to prepare rows for a later call of `loss_terms`, if there are worker processes for this."""
        ...

    def loss_terms(self, rows: Sequence[int], epoch: int) -> Mapping[str, torch.Tensor]:
        """The terms of a micro-batch's loss, by name: scalars with a gradient, summed over all that `weight` counts."""
        ...

    def weight(self, rows: Sequence[int]) -> int:
        """The divisor of a step's summed loss: its number of labelled tokens, pictures or batches."""
        ...

    def size(self, rows: Sequence[int]) -> Mapping[str, int]:
        """The counts of a step's rows for the log, by unit."""
        ...

    def first_record(self) -> Mapping[str, float]:
        """Figures for the first line of the log."""
        ...

    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Metrics of the held-out rows, by name; empty if there are no held-out rows."""
        ...
