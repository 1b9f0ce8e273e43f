"""What a tuning run is about: its rows, and how they become a loss. The loop knows nothing else of text or images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from offsite.config import TuneSpec
from offsite.data.batches import collate, micro_batches, step_batches
from offsite.data.tokens import Example
from offsite.evaluation.row_losses import perplexity, row_losses
from offsite.models.backbone import Network
from offsite.progress import Progress
from offsite.training.label_losses import label_losses


class Task(Protocol):
    """Rows by number, from 0."""

    unit: ClassVar[str]  # what `size` counts beside labels, and speed is told in

    @property
    def rows(self) -> int:
        """How many there are to train on."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def order(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The rows of every step of an epoch, a function of the arguments alone."""
        ...

    def groups(self, rows: Sequence[int], spec: TuneSpec) -> Iterator[list[int]]:
        """Rows of a step, cut into what runs at once under these settings."""
        ...

    def loss(self, rows: Sequence[int], seed: int, epoch: int) -> torch.Tensor:
        """Nats summed over the labels of rows that run at once."""
        ...

    def foresee(self, rows: Sequence[int], seed: int, epoch: int) -> None:
        """Rows whose `loss` will be asked for soon: what can be done for them beside the network may begin."""
        ...

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """Units and labels of rows."""
        ...

    def validate(self, spec: TuneSpec, progress: Progress, stage: str) -> Mapping[str, float]:
        """Figures of the held-out rows; nothing where there are none."""
        ...


@dataclass(frozen=True)
class TextTask:
    """Labelled tokens of text under a language model."""

    unit: ClassVar[str] = "tokens"
    network: Network
    examples: Sequence[Example]
    held_out: Sequence[Example]  # may be empty

    @property
    def rows(self) -> int:
        """As in `Task`."""
        return len(self.examples)

    @property
    def device(self) -> torch.device:
        """As in `Task`."""
        return self.network.head.weight.device

    def order(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """As in `Task`: shuffled, with rows of similar length in a step."""
        return step_batches(self.examples, rows=batch_size, seed=seed, epoch=epoch)

    def groups(self, rows: Sequence[int], spec: TuneSpec) -> Iterator[list[int]]:
        """As in `Task`."""
        return micro_batches(self.examples, rows, spec.tokens_at_once)

    def loss(self, rows: Sequence[int], seed: int, epoch: int) -> torch.Tensor:
        """As in `Task`."""
        return label_losses(self.network, collate([self.examples[i] for i in rows]))[0]

    def foresee(self, rows: Sequence[int], seed: int, epoch: int) -> None:
        """As in `Task`: text is ready."""

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """As in `Task`."""
        return {
            self.unit: sum(len(self.examples[i].ids) for i in rows),
            "labels": sum(self.examples[i].labels for i in rows),
        }

    def validate(self, spec: TuneSpec, progress: Progress, stage: str) -> Mapping[str, float]:
        """As in `Task`."""
        if not self.held_out:
            return {}
        losses = row_losses(self.network, self.held_out, 2 * spec.tokens_at_once, progress, stage)
        loss = sum(row.nats for row in losses) / sum(row.tokens for row in losses)
        return {"loss": loss, "perplexity": perplexity(loss)}
