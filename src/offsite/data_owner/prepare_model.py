"""Prepares a bundle's model: loads it, prepares it for its device, attaches the adapter, and makes the task."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from offsite.config import TuneSpec
from offsite.data_owner.image_task import ImageTask, head_parameters, new_head
from offsite.data_owner.methods import METHODS
from offsite.data_owner.methods.trained_head import attach_head
from offsite.data_owner.sent_bundle import as_sent
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.data_owner.tuning_data import TextData
from offsite.data_owner.tuning_pictures import Album
from offsite.kernels import Report, prepare, prepare_adapters
from offsite.kernels.runtime import Runtime
from offsite.models.backbone import split_backbone_and_head
from offsite.models.image_encoder import BIAS, WEIGHT, encoder_of
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from offsite.progress import Progress
from offsite.protocol.artifacts import Bundle
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def prepare_model(
    bundle: Bundle, data: TextData | Album, spec: TuneSpec, runtime: Runtime, progress: Progress
) -> Tuning:
    """Load a bundle's model and attach the trainable parameters. Random numbers come from torch's global generator.

    Args:
        bundle: the verified bundle.
        data: the rows, from `read_data`.
        spec: the settings of the tuning.
        runtime: the device, and the dtype of frozen weights.
        progress: receives the progress events.

    Raises:
        IncompatibleError: the bundle does not load, has nothing for the method to train, or does not have the tensors
            that its manifest lists.
        StorageError: its weights cannot be read.
    """
    with as_sent():
        model = load_model(bundle.files, dtype=runtime.dtype, device=runtime.device)
    if isinstance(data, Album):
        return _prepare_pictures(bundle, model, data, spec, runtime, progress)
    return _prepare_text(bundle, model, data, spec, runtime)


def _prepare_text(bundle: Bundle, model: "PreTrainedModel", data: TextData, spec: TuneSpec, runtime: Runtime) -> Tuning:
    """Make the tuning on text: attach the trainable parameters, and make the task from the rows."""
    with as_sent():
        network = split_backbone_and_head(model)
    attached, kernels = _attach(bundle, model, spec, runtime)
    working = attached | attach_head(model, bundle.manifest, spec)
    weights = MasterWeights(working, decayed=_decayed(bundle, spec, working))
    task = TextTask(network, data.examples, data.held_out, Batching.of(spec))
    return _tuning(bundle, model, spec, task, weights, kernels)


def _prepare_pictures(
    bundle: Bundle, model: "PreTrainedModel", album: Album, spec: TuneSpec, runtime: Runtime, progress: Progress
) -> Tuning:
    """Make the tuning on pictures: make the classifier's head, attach the trainable parameters, and make the task."""
    encoder = encoder_of(model)
    used = encoder.read_by(spec.images.pooling)
    head = new_head(
        encoder, album, used, spec, progress
    )  # before the method is attached, on the encoder as it was sent
    classifier = head_parameters(head)
    attached, kernels = _attach(bundle, model, spec, runtime)
    weights = MasterWeights(
        attached | classifier,
        decayed=_decayed(bundle, spec, attached) | {WEIGHT},
        rate_factors=dict.fromkeys(classifier, spec.head_factor),
    )
    task = ImageTask(encoder, head, used, album, spec.images.augment, Batching.of(spec))
    return _tuning(bundle, model, spec, task, weights, kernels)


def _attach(
    bundle: Bundle, model: "PreTrainedModel", spec: TuneSpec, runtime: Runtime
) -> tuple[dict[str, "nn.Parameter"], Report]:
    """Prepare the model for its device and attach the method's trainable parameters.

    Returns:
        The trainable parameters, by name, and the report of the kernels.
    """
    report = prepare(model, runtime.device, runtime.dtype)
    attached = METHODS[spec.adapter.method](model, bundle.manifest, spec)
    return attached, report.with_pieces(*prepare_adapters(model, runtime.device))


def _decayed(bundle: Bundle, spec: TuneSpec, names: Iterable[str]) -> frozenset[str]:
    """The names of the trained parameters with weight decay: matrices of linear layers and of the head."""
    family = bundle.manifest.family
    adds_layers = spec.adapter.method in ("lora", "bottleneck")  # these methods add linear layers only
    return frozenset(
        name
        for name in names
        if family.is_linear(name)
        or (adds_layers and name.endswith(".weight"))
        or name == f"{family.head_module}.weight"
    )


def _tuning(
    bundle: Bundle,
    model: "PreTrainedModel",
    spec: TuneSpec,
    task: TextTask | ImageTask,
    weights: MasterWeights,
    kernels: Report,
) -> Tuning:
    """Make the `Tuning` from its parts; trained tensors get their names and shapes in the return."""
    family = bundle.manifest.family
    blocks = model.get_submodule(family.module_blocks or family.blocks)
    classifier = {name: master for name, master in weights.masters.items() if name in (WEIGHT, BIAS)}
    adapter = {name: master for name, master in weights.masters.items() if name not in classifier}
    by_file = in_files(family, adapter) if spec.adapter.method in ("full", "bitfit") else adapter
    return Tuning(
        task=task,
        blocks=blocks,
        trained=[blocks.get_submodule(str(index)) for index in bundle.manifest.split.trained],
        weights=weights,
        returned={**by_file, **classifier},
        kernels=kernels,
    )
