"""What the training loop asks of a task. The loop itself knows nothing of text, pictures or hidden states."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offsite.config import TuneSpec
from offsite.progress import Progress


@dataclass(frozen=True)
class Batching:
    """How rows become optimiser steps and micro-batches."""

    rows: int  # in an optimiser step
    tokens: int  # most padded tokens (of pictures: patches) in a micro-batch
    seed: int  # of the order of the rows, and of how pictures are cropped

    @classmethod
    def of(cls, spec: TuneSpec) -> "Batching":
        """As the settings of a tuning say."""
        return cls(spec.length.batch_size, spec.tokens_at_once, spec.seed)


class TrainingTask(Protocol):
    """Rows by number, from 0, and how they become a loss.

    `loss_terms` may be called from several threads at once; everything else is called from one.
    """

    @property
    def unit(self) -> str:
        """What speed is measured in, such as "tokens": a key of `size`."""
        ...

    @property
    def term_weights(self) -> Mapping[str, float]:
        """The terms of the loss by name, and the factor of each in the sum that is minimised."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def order(self, epoch: int) -> Sequence[Sequence[int]]:
        """The rows of every step of an epoch. It depends on the epoch (from 0) alone, so a resumed run is the same."""
        ...

    def micro_batches(self, rows: Sequence[int]) -> Iterable[Sequence[int]]:
        """The rows of a step, cut into what runs at once."""
        ...

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Start preparing rows whose `loss_terms` will be asked for soon, where other processes can do so."""
        ...

    def loss_terms(self, rows: Sequence[int], epoch: int) -> Mapping[str, torch.Tensor]:
        """The terms of the loss of one micro-batch: scalars with a gradient, each summed over what `weight` counts."""
        ...

    def weight(self, rows: Sequence[int]) -> int:
        """What the summed loss of a step is divided by: its labelled tokens, its pictures or its batches."""
        ...

    def size(self, rows: Sequence[int]) -> Mapping[str, int]:
        """Counts of a step's rows for the log, by unit."""
        ...

    def first_record(self) -> Mapping[str, float]:
        """Figures for the first line of the log."""
        ...

    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Figures of the held-out rows; empty where there are none."""
        ...
