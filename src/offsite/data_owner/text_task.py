"""Tuning on text: the tokenised rows, and their loss with a language model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from offsite.data.batches import collate, micro_batches, step_batches
from offsite.data.examples import Example
from offsite.evaluation.row_losses import perplexity, row_losses
from offsite.models.backbone import Network
from offsite.progress import Progress
from offsite.training.label_losses import label_losses
from offsite.training.processes import ONE, Processes
from offsite.training.task import Batching


@dataclass(frozen=True)
class TextTask:
    """Training on labelled tokens with a language model; a `TrainingTask`."""

    unit: ClassVar[str] = "tokens"
    term_weights: ClassVar[Mapping[str, float]] = {"loss": 1.0}
    network: Network
    examples: Sequence[Example]
    held_out: Sequence[Example]  # may be empty
    batching: Batching
    processes: Processes = ONE  # of which each computes the losses of its share of the held-out rows

    @property
    def rows(self) -> int:
        """The number of training rows."""
        return len(self.examples)

    @property
    def validates(self) -> bool:
        """Whether there are held-out rows."""
        return bool(self.held_out)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.network.head.weight.device

    def order(self, epoch: int) -> list[list[int]]:
        """The rows (by index) of every step of an epoch, in random order, with rows of similar length in one step."""
        return step_batches(self.examples, rows=self.batching.rows, seed=self.batching.seed, epoch=epoch)

    def micro_batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Cut the rows of a step into micro-batches by their tokens; a row longer than a micro-batch runs alone."""
        return micro_batches(self.examples, rows, self.batching.tokens)

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Do nothing, since text needs no preparation."""

    def loss(self, rows: Sequence[int], epoch: int) -> torch.Tensor:
        """Compute the loss in nats, summed over the labelled tokens of a micro-batch; a scalar."""
        return label_losses(self.network, collate([self.examples[i] for i in rows]))[0]

    def loss_terms(self, rows: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """Compute the only term of the loss, under the name `loss`."""
        return {"loss": self.loss(rows, epoch)}

    def weight(self, rows: Sequence[int]) -> int:
        """The number of labelled tokens in these rows."""
        return sum(self.examples[i].labels for i in rows)

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """The number of tokens and of labelled tokens in these rows, for the log."""
        return {self.unit: sum(len(self.examples[i].ids) for i in rows), "labels": self.weight(rows)}

    def first_record(self) -> dict[str, float]:
        """The number of training rows, for the first record of the log."""
        return {"rows": self.rows}

    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Compute loss per labelled token and perplexity on the held-out rows; empty if there are none.

        `stage` is the name of the work in progress events.
        """
        if not self.held_out:
            return {}
        rows = self.processes.share(self.held_out)
        losses = row_losses(self.network, rows, 2 * self.batching.tokens, progress, stage)
        nats, tokens = self.processes.sum([sum(row.nats for row in losses), sum(row.tokens for row in losses)])
        loss = nats / tokens
        return {"loss": loss, "perplexity": perplexity(loss)}
