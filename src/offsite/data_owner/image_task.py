"""Tuning on pictures: the classifier's head, and the loss of pictures with an encoder and this head.

The head is linear and trains together with the adapter. If it starts as a linear probe of the emulator, it is already
good and gets a lower learning rate; if it starts at random, it gets a higher one (paper, appendix: ten times).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from offsite.config import TuneSpec
from offsite.data.pictures.picture_sizes import at_once
from offsite.data_owner.tuning_pictures import Album
from offsite.evaluation.image_scores import fit_probe, probe_features
from offsite.models.image_encoder import BIAS, WEIGHT, Encoder, batches
from offsite.models.to_device import to_device
from offsite.progress import Event, Progress
from offsite.training.processes import ONE, Processes
from offsite.training.task import Batching

_HEAD_SPREAD = 0.01  # standard deviation of the weights of a random head


def new_head(encoder: Encoder, album: Album, used: torch.Tensor, spec: TuneSpec, progress: Progress) -> nn.Linear:
    """Make a classifier's head in fp32; its weight is zero for features that it must not read.

    With head_start "probe" it starts as a linear probe of the frozen encoder, so that the first steps do not distort
    the encoder's features (arXiv 2202.10054). With "random" it is drawn from torch's global generator.

    Args:
        encoder: the encoder whose features the head reads.
        album: the pictures that the probe is fitted on, and their classes.
        used: a mask of the features, (F,): 1 for features that the head reads, otherwise 0.
        spec: the settings of the tuning, such as `head_start`.
        progress: receives the progress events.
    """
    head = nn.Linear(encoder.inputs, len(album.classes))
    with torch.no_grad():
        if spec.images.head_start == "probe":
            count = at_once(album.tokens, spec.tokens_at_once)
            features = probe_features(encoder, album.train, count, progress) * used
            weight, bias = fit_probe(features, album.labels(album.train).to(encoder.device), len(album.classes))
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        else:
            nn.init.normal_(head.weight, std=_HEAD_SPREAD)
            nn.init.zeros_(head.bias)
        head.weight.mul_(used.cpu())
    return head.to(encoder.device)


def head_parameters(head: nn.Linear) -> dict[str, nn.Parameter]:
    """The head's parameters, by their names in the return."""
    own = dict(head.named_parameters())
    return {WEIGHT: own["weight"], BIAS: own["bias"]}


@dataclass(frozen=True)
class ImageTask:
    """Training on pictures with an encoder and a classifier's head; a `TrainingTask`."""

    unit: ClassVar[str] = "images"
    term_weights: ClassVar[Mapping[str, float]] = {"loss": 1.0}
    encoder: Encoder
    head: nn.Linear
    used: torch.Tensor  # (F,), 1 for features that the head reads, otherwise 0
    album: Album
    augment: bool
    batching: Batching
    processes: Processes = ONE  # of which each classifies its share of the held-out pictures

    @property
    def rows(self) -> int:
        """The number of training pictures."""
        return len(self.album.train)

    @property
    def validates(self) -> bool:
        """Whether there are held-out pictures."""
        return self.album.held_out is not None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.encoder.device

    def order(self, epoch: int) -> list[list[int]]:
        """The training pictures (by index) of every step of an epoch, in random order."""
        order = np.random.default_rng([self.batching.seed, epoch]).permutation(self.rows).tolist()
        return [order[at : at + self.batching.rows] for at in range(0, len(order), self.batching.rows)]

    def micro_batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Cut the pictures of a step into micro-batches by their number of tokens."""
        return ([rows[i] for i in places] for places in batches(len(rows), self._at_once))

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Start to decode and crop pictures in worker processes, if there are any."""
        self.album.train.prefetch(rows, self._key(epoch))

    def loss(self, rows: Sequence[int], epoch: int) -> torch.Tensor:
        """Compute the loss in nats, summed over the pictures of a micro-batch; a scalar.

        Random crops depend only on the seed, the epoch and the picture.
        """
        pixels = self.album.train.batch(rows, self._key(epoch))
        targets = to_device(self.album.labels(self.album.train)[list(rows)].numpy(), self.device)
        return F.cross_entropy(self.head(self.encoder.features(pixels) * self.used), targets, reduction="sum")

    def loss_terms(self, rows: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """Compute the only term of the loss, under the name `loss`."""
        return {"loss": self.loss(rows, epoch)}

    def weight(self, rows: Sequence[int]) -> int:
        """The number of pictures, since each has one label."""
        return len(rows)

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """The number of pictures and of labels in a step, for the log."""
        return {self.unit: len(rows), "labels": len(rows)}

    def first_record(self) -> dict[str, float]:
        """The number of training pictures, for the first record of the log."""
        return {"rows": self.rows}

    @torch.no_grad()
    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Compute loss per picture and accuracy on the held-out pictures; empty if there are none.

        `stage` is the name of the work in progress events.
        """
        held_out = self.album.held_out
        if held_out is None:
            return {}
        targets, nats, right, done = self.album.labels(held_out), 0.0, 0, 0
        own = self.processes.share(range(len(held_out)))
        for rows, pixels in held_out.in_order(2 * self._at_once, own):
            logits = self.head(self.encoder.features(pixels) * self.used).cpu()
            nats += float(F.cross_entropy(logits, targets[list(rows)], reduction="sum"))
            right += int((logits.argmax(dim=1) == targets[list(rows)]).sum())
            done += len(rows)
            progress(Event(stage, done, len(own)))
        nats, accurate = self.processes.sum([nats, right])
        return {"loss": nats / len(held_out), "accuracy": accurate / len(held_out)}

    @property
    def _at_once(self) -> int:
        """The number of pictures of a micro-batch."""
        return at_once(self.album.tokens, self.batching.tokens)

    def _key(self, epoch: int) -> list[int] | None:
        """The seed of the random crops of an epoch; None if pictures are not cropped at random."""
        return [self.batching.seed, epoch] if self.augment else None
