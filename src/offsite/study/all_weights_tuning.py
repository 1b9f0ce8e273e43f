"""Makes all weights of a base model trainable, and builds the input of the training loop for full fine-tuning."""

from typing import TYPE_CHECKING

from torch import nn

from offsite.config import TuneSpec
from offsite.data.examples import Example
from offsite.data.pictures.picture_files import Floats
from offsite.data_owner.image_task import ImageTask, head_parameters, new_head
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.data_owner.tuning_pictures import Album
from offsite.kernels import Piece, Report, backend_of, prepare
from offsite.models.backbone import split_backbone_and_head
from offsite.models.families.architectures import Architecture
from offsite.models.image_encoder import WEIGHT, Encoder, encoder_of
from offsite.progress import Progress
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def all_weights_on_text(
    model: "PreTrainedModel",
    family: Architecture,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    spec: TuneSpec,
) -> Tuning:
    """Make every parameter of a language model trainable; dropout runs in all of its modules.

    Args:
        model: the language model as it was loaded; it is changed.
        family: the model's family.
        examples: tokenised rows to train on.
        held_out: tokenised rows to validate on; may be empty.
        spec: settings of the run, which say how many rows make a step and a micro-batch.
    """
    network = split_backbone_and_head(model)
    report = prepare(model, model.device, model.dtype)
    model.requires_grad_(True)
    working = dict(model.named_parameters())  # a tied head is the embedding, and is listed once
    matrices = {
        *(name for name, sizes in family.embeddings.items() if " " in sizes),
        family.head,
    }  # no norm has 2 sizes
    return Tuning(
        task=TextTask(network, examples, held_out, Batching.of(spec)),
        blocks=model.get_submodule(family.blocks),
        trained=[model],
        weights=MasterWeights(
            working, decayed=[name for name in working if name in matrices or family.is_linear(name)]
        ),
        returned={},
        kernels=report,
    )


def all_weights_on_pictures(
    model: "PreTrainedModel", family: Architecture, album: Album, spec: TuneSpec, progress: Progress
) -> Tuning:
    """Add a classifier head to an image encoder, and make every parameter trainable that the head depends on.

    Args:
        model: the encoder, as it was loaded; it is changed.
        family: the model's family.
        album: pictures to train and to validate on.
        spec: settings of the run, for the head's first values and the number of pictures in a step and a micro-batch.
        progress: called with the progress events.
    """
    encoder = encoder_of(model)
    used = encoder.read_by(spec.images.pooling)
    head = new_head(encoder, album, used, spec, progress)
    classifier = head_parameters(head)
    model.requires_grad_(True)
    trained = _reached(encoder, album.train.batch(range(1)))
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return Tuning(
        task=ImageTask(encoder, head, used, album, spec.images.augment, Batching.of(spec)),
        blocks=model.get_submodule(family.module_blocks or family.blocks),
        trained=[model],
        weights=MasterWeights(
            trained | classifier,
            decayed=[WEIGHT, *(name for name in trained if family.is_linear(name))],
            rate_factors=dict.fromkeys(classifier, spec.head_factor),
        ),
        returned={},
        kernels=Report(backend_of(encoder.device), (Piece("all modules", 0, "as the library wrote them"),)),
    )


def _reached(encoder: Encoder, pixels: Floats) -> dict[str, nn.Parameter]:
    """The encoder's parameters that the head's input depends on, by name; found by a backward pass.

    Others, such as a mask token or a norm after the head's input, get no gradient and are not returned.
    """
    encoder.features(pixels).sum().backward()  # type: ignore[no-untyped-call]
    reached = {name: parameter for name, parameter in encoder.body.named_parameters() if parameter.grad is not None}
    encoder.body.zero_grad(set_to_none=True)
    return reached
