"""Computes the loss of every row of a data set; validation and all scores of a language model use it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offsite.data.batches import collate, micro_batches
from offsite.data.examples import Example
from offsite.kernels import forward_runner
from offsite.models.backbone import Network
from offsite.progress import Event, Progress, silent
from offsite.training.label_losses import label_losses


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row of a data set: nats summed over its labelled tokens, and the number of these tokens."""

    line: int  # line of the row in its file, or number of the block of a long text; from 1
    nats: float
    tokens: int  # number of labelled tokens
    file: Path | None = None  # the file of the line


def perplexity(loss: float) -> float:
    """Compute the perplexity exp(loss); infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def row_losses(
    network: Network, examples: Sequence[Example], budget: int, progress: Progress = silent, stage: str = "evaluating"
) -> list[RowLoss]:
    """Compute the loss of every example, in the order of the examples.

    Args:
        network: backbone and head, in eval mode.
        examples: the examples to score.
        budget: the largest number of tokens (padding included) that run at the same time, over all micro-batches side
            by side.
        progress: receives the progress events.
        stage: the name of the stage in these events.
    """
    found: dict[int, RowLoss] = {}
    nats_so_far, tokens_so_far = 0.0, 0

    @torch.no_grad()
    def nats_of(group: list[int]) -> list[float]:
        batch = collate([examples[i] for i in group])
        nats = label_losses(network, batch)[1].double().cpu()  # (L,)
        sums = torch.zeros(len(group), dtype=torch.float64).index_add_(0, torch.from_numpy(batch.owners), nats)
        return sums.tolist()

    with forward_runner(network.body) as run:
        groups = list(micro_batches(examples, range(len(examples)), max(1, budget // run.count)))
        for group, sums in zip(groups, run(nats_of, groups), strict=True):
            for i, total in zip(group, sums, strict=True):
                found[i] = RowLoss(examples[i].line, total, examples[i].labels, examples[i].file)
                nats_so_far, tokens_so_far = nats_so_far + total, tokens_so_far + examples[i].labels
            progress(Event(stage, len(found), len(examples), {"loss": nats_so_far / tokens_so_far}))
    return [found[i] for i in range(len(examples))]
