"""Runs a vision encoder: from images to the features that a classifier's linear head reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from offsite.errors import IncompatibleError, UsageError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.family import Vision
from offsite.models.to_device import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offsite.data.pictures.picture_files import Floats

Pooling = Literal["class", "mean", "both"]
WEIGHT, BIAS = "classifier.weight", "classifier.bias"  # the head's tensors in every classifier of the table
CLASSIFIERS = "ForImageClassification"  # the end of the names of transformers' classifier classes


@dataclass(frozen=True)
class Encoder:
    """A vision encoder that computes the features that a classifier's linear head reads.

    `vision.features` names these features: class token, mean of the patches, or pooled output.
    """

    body: nn.Module
    vision: Vision
    before: int  # tokens before the patches
    hidden: int

    @property
    def device(self) -> torch.device:
        """The device of the encoder's parameters."""
        return next(self.body.parameters()).device

    @property
    def inputs(self) -> int:
        """The number of values F that the head reads for one image."""
        return self.hidden * len(self.vision.features)

    def features(self, pixels: "Floats") -> torch.Tensor:
        """Run the encoder on images (B, 3, Y, X); return the features that the head reads, (B, F) in fp32."""
        dtype = next(self.body.parameters()).dtype
        output = self.body(pixel_values=to_device(pixels, self.device).to(dtype))
        tokens = output.last_hidden_state  # (B, T, H)
        parts = {
            "class": lambda: tokens[:, 0],
            "mean": lambda: tokens[:, self.before :].mean(dim=1),
            "pooled": lambda: output.pooler_output,
        }
        return torch.cat([parts[name]() for name in self.vision.features], dim=1).float()

    def read_by(self, pooling: Pooling | None) -> torch.Tensor:
        """The mask (F,) of the features that a head uses: 1 for used, 0 for features whose head weights remain zero.

        `pooling` None means the family's default.

        Raises:
            UsageError: the classifier of this family does not have this pooling.
        """
        wanted = (
            {"class", "mean"} if pooling == "both" else set(self.vision.features if pooling is None else (pooling,))
        )
        if not wanted <= set(self.vision.features):
            raise UsageError(
                f"the classifier of this family cannot read pooling '{pooling}'",
                reasons=[f"{self.vision.class_name} reads {' and '.join(self.vision.features)}"],
                next_step="leave the setting pooling out",
            )
        used = [torch.full((self.hidden,), float(name in wanted)) for name in self.vision.features]
        return torch.cat(used).to(self.device)


def encoder_of(model: "PreTrainedModel") -> Encoder:
    """The `Encoder` for a model that `offsite.models.loading.load_model` loaded.

    Raises:
        IncompatibleError: the model is not an image encoder.
    """
    family = ARCHITECTURES.get(model.config.model_type)
    if family is None or family.vision is None:
        raise IncompatibleError(
            f"models of type {model.config.model_type!r} are no image encoders", next_step="name an image encoder"
        )
    before = sum(int(word) if word.isdigit() else int(getattr(model.config, word)) for word in family.vision.before)
    return Encoder(model, family.vision, before, int(model.config.hidden_size))


def sees_images(settings: Mapping[str, Any]) -> bool:
    """Whether a model with this config is an image encoder or classifier."""
    family = ARCHITECTURES.get(str(settings.get("model_type")))
    return (family is not None and family.vision is not None) or is_classifier(settings)


def is_classifier(settings: Mapping[str, Any]) -> bool:
    """Whether a model with this config is an image classifier, with its own head."""
    names = settings.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIERS) for name in names)


def batches(count: int, size: int) -> Sequence[range]:
    """Divide the indices 0 to `count` - 1, in order, into ranges of `size` indices (the last can be shorter)."""
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
