"""Tuning on pictures: the data set, the classifier's head, and their loss under an encoder.

The head is linear and trains together with the adapter. Started as a linear probe of the emulator it is good already
and gets a lower learning rate; started at random it gets a higher one (paper, appendix: ten times).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from offsite.config import TuneSpec
from offsite.data.picture_files import held_out_part, load_processor, read_pictures, split_by_seed
from offsite.data.picture_sizes import at_once, seen_picture
from offsite.data.picture_workers import PictureWorkers
from offsite.data.pictures import Pictures
from offsite.errors import DataError, UsageError
from offsite.evaluation.image_scores import fit_probe, probe_features
from offsite.models.architectures import ARCHITECTURES
from offsite.models.image_encoder import BIAS, WEIGHT, Encoder, batches
from offsite.models.modules.declared import unwrapped
from offsite.progress import Event, Progress
from offsite.protocol.contents import CONFIG
from offsite.protocol.manifest import ClassName
from offsite.storage.safetensors_files import strict_json
from offsite.training.task import Batching

_HEAD_SPREAD = 0.01  # of the weights of a new head


@dataclass(frozen=True)
class Album:
    """The pictures of a tuning run, and the names of their classes in the order of the head's outputs."""

    train: Pictures
    held_out: Pictures | None
    classes: tuple[str, ...]
    tokens: int  # of one picture

    @property
    def rows(self) -> int:
        """How many pictures there are to train on."""
        return len(self.train)

    def labels(self, pictures: Pictures) -> torch.Tensor:
        """The class of each picture by its place, (N,)."""
        place = {name: index for index, name in enumerate(self.classes)}
        return torch.tensor([place[picture.label or ""] for picture in pictures.pictures])


def open_album(
    bundle: Path,
    data: Path,
    eval_data: Path | None,
    spec: TuneSpec,
    progress: Progress,
    workers: PictureWorkers | None = None,
) -> Album:
    """Read and decode the pictures that a run is about.

    Args:
        bundle: a folder whose image processor prepares them.
        data: the pictures to train on, or all.
        eval_data: held-out ones.
        spec: what is held out, and whether broken ones are left out.
        progress: where the events go.
        workers: who decodes; None takes threads of this process.

    Raises:
        DataError: pictures or rows are bad, there are fewer than two classes, or held-out ones are of other classes.
        UsageError: held-out pictures are asked for in two ways, or a share that is less than one.
        IncompatibleError: the bundle's image processor does not fit its model.
    """
    processor = load_processor(bundle)
    listed = read_pictures(data, part="train")
    if eval_data is not None:
        if spec.images.eval_share:
            raise UsageError("held-out pictures and eval_share were both given", next_step="give one of them")
        held_out = read_pictures(eval_data, part="held out")
    elif spec.images.eval_share:
        listed, held_out = split_by_seed(listed, spec.images.eval_share, spec.seed)
    else:
        held_out = read_pictures(data, part="held out") if held_out_part(data) else []
    progress(Event("decoding the pictures", 0))
    train = Pictures(listed, processor, skip_bad=spec.images.skip_bad, workers=workers)
    kept = Pictures(held_out, processor, skip_bad=spec.images.skip_bad, workers=workers) if held_out else None
    if train.skipped or (kept and kept.skipped):
        progress(Event("bad pictures left out", len(train.skipped) + (len(kept.skipped) if kept else 0)))
    classes = tuple(sorted({picture.label or "" for picture in train.pictures}))
    strange = {picture.label or "" for picture in kept.pictures} - set(classes) if kept else set()
    if len(classes) < 2 or strange:
        raise DataError(
            "the pictures do not make a task of classification",
            reasons=[f"classes to train on: {', '.join(classes)[:200]}"]
            + ([f"only among the held-out ones: {', '.join(sorted(strange))[:200]}"] if strange else []),
            next_step="give pictures of at least two classes, and of each that is held out some to train on",
        )
    unfit = [name[:40] for name in classes if not _returnable(name)]
    if unfit:
        raise DataError(
            "names of classes that cannot be returned",
            reasons=unfit,
            next_step="at most 128 characters, and none that controls a terminal",
        )
    config, _ = unwrapped(strict_json((bundle / CONFIG).read_bytes()))
    return Album(train, kept, classes, seen_picture(bundle, ARCHITECTURES[config["model_type"]], config).tokens)


def _returnable(name: str) -> bool:
    """Whether a return may name a class so."""
    try:
        TypeAdapter(ClassName).validate_python(name)
    except ValidationError:
        return False
    return True


def new_head(encoder: Encoder, album: Album, used: torch.Tensor, spec: TuneSpec, progress: Progress) -> nn.Linear:
    """A head in fp32 that may be trained; zero where it may not read.

    As a linear probe it starts where the encoder's features are best put to use as they are, so that what is trained
    with it is not led astray first (arXiv 2202.10054); at random it is drawn under the caller's seed.
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
    """The head's parameters by the names under which they are returned."""
    own = dict(head.named_parameters())
    return {WEIGHT: own["weight"], BIAS: own["bias"]}


@dataclass(frozen=True)
class ImageTask:
    """Pictures under an encoder and a head; a `TrainingTask`."""

    unit: ClassVar[str] = "images"
    term_weights: ClassVar[Mapping[str, float]] = {"loss": 1.0}
    encoder: Encoder
    head: nn.Linear
    used: torch.Tensor  # (F,), 1 where the head reads
    album: Album
    augment: bool
    batching: Batching

    @property
    def rows(self) -> int:
        """How many pictures there are to train on."""
        return len(self.album.train)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.encoder.device

    def order(self, epoch: int) -> list[list[int]]:
        """The pictures of every step of an epoch: shuffled."""
        order = np.random.default_rng([self.batching.seed, epoch]).permutation(self.rows).tolist()
        return [order[at : at + self.batching.rows] for at in range(0, len(order), self.batching.rows)]

    def micro_batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The pictures of a step, cut by their tokens."""
        return ([rows[i] for i in places] for places in batches(len(rows), self._at_once))

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Other processes start to decode and crop them."""
        self.album.train.prefetch(rows, self._key(epoch))

    def loss(self, rows: Sequence[int], epoch: int) -> torch.Tensor:
        """Nats summed over pictures that run at once, a scalar; crops depend on seed, epoch and row alone."""
        pixels = self.album.train.batch(rows, self._key(epoch))
        targets = self.album.labels(self.album.train)[list(rows)].to(self.device)
        return F.cross_entropy(self.head(self.encoder.features(pixels) * self.used), targets, reduction="sum")

    def loss_terms(self, rows: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        """The one term, `loss`."""
        return {"loss": self.loss(rows, epoch)}

    def weight(self, rows: Sequence[int]) -> int:
        """How many pictures these are: each has one label."""
        return len(rows)

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """Pictures and labels of rows."""
        return {self.unit: len(rows), "labels": len(rows)}

    def first_record(self) -> dict[str, float]:
        """How many pictures train."""
        return {"rows": self.rows}

    @torch.no_grad()
    def validate(self, progress: Progress, stage: str) -> Mapping[str, float]:
        """Loss per picture and accuracy of the held-out pictures; empty where there are none."""
        held_out = self.album.held_out
        if held_out is None:
            return {}
        targets, nats, right = self.album.labels(held_out), 0.0, 0
        for rows, pixels in held_out.in_order(2 * self._at_once):
            logits = self.head(self.encoder.features(pixels) * self.used).cpu()
            nats += float(F.cross_entropy(logits, targets[list(rows)], reduction="sum"))
            right += int((logits.argmax(dim=1) == targets[list(rows)]).sum())
            progress(Event(stage, rows[-1] + 1, len(held_out)))
        return {"loss": nats / len(held_out), "accuracy": right / len(held_out)}

    @property
    def _at_once(self) -> int:
        return at_once(self.album.tokens, self.batching.tokens)

    def _key(self, epoch: int) -> list[int] | None:
        return [self.batching.seed, epoch] if self.augment else None
