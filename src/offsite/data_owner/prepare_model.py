"""Prepares a bundle's model: loads it, prepares it for its device, attaches the adapter, and makes the task."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from offsite.config import TuneSpec
from offsite.data_owner.image_task import ImageTask, head_parameters, new_head
from offsite.data_owner.methods import METHODS
from offsite.data_owner.methods.trained_head import attach_head
from offsite.data_owner.sent_bundle import as_sent
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.data_owner.tuning_data import TextData
from offsite.data_owner.tuning_pictures import Album
from offsite.errors import UsageError
from offsite.kernels import Piece, Report, prepare, prepare_adapters, prepare_sharded
from offsite.kernels.runtime import Runtime
from offsite.models.backbone import split_backbone_and_head
from offsite.models.image_encoder import BIAS, WEIGHT, encoder_of
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from offsite.progress import Progress
from offsite.protocol.artifacts import Bundle
from offsite.training.master_weights import MasterWeights
from offsite.training.processes import ONE, Processes
from offsite.training.shard_blocks import shard_blocks
from offsite.training.task import Batching

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def prepare_model(
    bundle: Bundle,
    data: TextData | Album,
    spec: TuneSpec,
    runtime: Runtime,
    progress: Progress,
    processes: Processes = ONE,
    audit: Callable[["PreTrainedModel"], None] | None = None,
) -> Tuning:
    """Load a bundle's model and attach the trainable parameters. Random numbers come from torch's global generator.

    Args:
        bundle: the verified bundle.
        data: the rows, from `read_data`.
        spec: the settings of the tuning.
        runtime: the device, and the dtype of frozen weights.
        progress: receives the progress events.
        processes: the processes of this run. With the setting `shard` they share the frozen weights of the blocks.
        audit: called with the model as it was sent, before anything is attached to it; None for no call.

    Raises:
        UsageError: blocks are to be shared by one process, or those of an image encoder.
        IncompatibleError: the bundle does not load, has nothing for the method to train, or does not have the tensors
            that its manifest lists.
        StorageError: its weights cannot be read.
    """
    sharded = spec.memory.shard == "blocks"
    if sharded:
        _require_shardable(data, processes)
    device = torch.device("cpu") if sharded else runtime.device  # the whole model need not fit on one device
    with as_sent():
        model = load_model(bundle.files, dtype=runtime.dtype, device=device)
    if audit is not None:
        audit(model)
    if isinstance(data, Album):
        tuning = _prepare_pictures(bundle, model, data, spec, runtime, progress)
    else:
        tuning = _prepare_text(bundle, model, data, spec, runtime)
    return replace(tuning, processes=processes, sharded=sharded)


def _require_shardable(data: TextData | Album, processes: Processes) -> None:
    """Refuse to share the blocks where that cannot work.

    Raises:
        UsageError: there is one process, or the model is an image encoder.
    """
    if processes.count == 1:
        raise UsageError(
            "--shard blocks was asked for, and there is one process",
            next_step="start several with `torchrun --nproc-per-node N -m offsite tune`, or leave --shard out",
        )
    if isinstance(data, Album):
        raise UsageError("--shard blocks is for text", next_step="leave --shard out: image encoders fit on one device")


def _prepare_text(bundle: Bundle, model: "PreTrainedModel", data: TextData, spec: TuneSpec, runtime: Runtime) -> Tuning:
    """Make the tuning on text: attach the trainable parameters, and make the task from the rows."""
    with as_sent():
        network = split_backbone_and_head(model)
    attached, kernels = _attach(bundle, model, spec, runtime)
    working = attached | attach_head(model, bundle.manifest, spec)
    if spec.memory.shard == "blocks":
        count = shard_blocks(model, _blocks(bundle, model), working.values(), runtime.device)
        kernels = kernels.with_pieces(Piece("blocks shared among the processes", count, "asked for"))
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
    if spec.memory.shard == "blocks":
        report = prepare_sharded(model, runtime.device, runtime.dtype)
        return METHODS[spec.adapter.method](model, bundle.manifest, spec), report
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
    family, blocks = bundle.manifest.family, _blocks(bundle, model)
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


def _blocks(bundle: Bundle, model: "PreTrainedModel") -> "nn.Module":
    """The list of the model's blocks."""
    family = bundle.manifest.family
    blocks: nn.Module = model.get_submodule(family.module_blocks or family.blocks)
    return blocks
