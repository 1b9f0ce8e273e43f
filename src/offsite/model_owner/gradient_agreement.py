"""How far an emulator's gradients agree with its base's, on rows of the model owner: a guess at how well adapters fit.

An adapter is trained along the emulator's gradients and then works in the base, so it can transfer only as far as both
point the same way. benchmarks/transfer.py measures how well the number predicts what a plug-in gains.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import CarryMap, KeptFeatures
from offsite.models.backbone import split_backbone_and_head
from offsite.models.families.family import Architecture
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Bundle
from offsite.training.label_losses import label_losses

_ROWS = 4  # examples of a batch


@dataclass(frozen=True)
class Agreement:
    """The cosine between the weight gradients of an emulator and of its base, over all layers that LoRA may train.

    Both gradients are of the same rows' loss. Of a base's layer that is narrower in the bundle, only the rows and
    columns that the bundle has count.
    """

    cosine: float  # over all layers at once
    of_layers: Mapping[str, float]  # for each layer, by the name that the manifest gives it
    losses: tuple[float, float]  # of the base and of the emulator, in nats per labelled token


def gradient_agreement(
    model: BaseModel, bundle: Bundle, carry: CarryMap, examples: Sequence[Example], device: torch.device
) -> Agreement:
    """Compute the gradients of base and emulator, in float32, and compare them.

    Args:
        model: the opened base.
        bundle: a bundle of this base.
        carry: the bundle's map, from the ledger.
        examples: encoded rows with labels.
        device: where the models run; base and emulator are loaded one after the other.
    """
    places = {target: model.family.linear_layer_of(target) for target in bundle.manifest.lora_targets}
    layers = {target: place for target, place in places.items() if place is not None}
    bases = {
        target: module_path(model.family, carry.blocks[block].base, path) for target, (block, path) in layers.items()
    }
    kept = {target: carry.features(block, path) for target, (block, path) in layers.items()}
    network = load_model(bundle.folder, dtype=torch.float32, device=device)
    loss, found = weight_gradients(network, list(layers), examples)
    del network
    base = load_model(model.folder, dtype=torch.float32, device=device)
    base_loss, wanted = weight_gradients(base, list(bases.values()), examples)
    products = {target: _products(found[target], _part(wanted[bases[target]], kept[target])) for target in layers}
    total = [math.fsum(column) for column in zip(*products.values(), strict=True)]
    return Agreement(_cosine(*total), {name: _cosine(*three) for name, three in products.items()}, (base_loss, loss))


def module_path(family: Architecture, block: int, path: str) -> str:
    """The name of a linear layer in the torch model.

    Args:
        family: the model's family.
        block: the block's index in this model.
        path: the layer's path in the block, as checkpoint files name it.
    """
    return family.module_of(f"{family.in_block(block, path)}.weight").removesuffix(".weight")


def weight_gradients(
    model: nn.Module, layers: Sequence[str], examples: Sequence[Example]
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all labels, and the loss's gradients for the weights of linear layers.

    The weights may be stored in any way (quantised, low-rank, ...): the gradients are those of the full matrices.

    Args:
        model: a causal language model with frozen weights.
        layers: names of its linear layers.
        examples: encoded rows with labels.

    Returns:
        The loss in nats per labelled token; and the gradients (outputs, inputs) of the loss summed over all labels,
        keyed by the layer's name.
    """
    network, total, labels = split_backbone_and_head(model), 0.0, 0
    with _collected(model, layers) as gradients:
        for at in range(0, len(examples), _ROWS):
            loss, of_labels = label_losses(network, collate(examples[at : at + _ROWS]))
            loss.backward()  # type: ignore[no-untyped-call]
            total, labels = total + float(loss.detach()), labels + len(of_labels)
    return total / labels, gradients


@contextlib.contextmanager
def _collected(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Context manager: yield a mapping into which backward passes add the layers' weight gradients."""
    gradients: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            entered = inputs[0].detach().flatten(0, -2)  # (N, inputs)

            def add(grad_output: Tensor) -> None:
                found = grad_output.flatten(0, -2).T @ entered
                gradients[name] = gradients[name] + found if name in gradients else found

            output.register_hook(add)  # type: ignore[no-untyped-call]

        handles.append(model.get_submodule(name).register_forward_hook(after))

    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())]
    try:
        for layer in layers:
            watch(layer)
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _part(gradient: Tensor, kept: KeptFeatures) -> Tensor:
    """The rows and columns of a gradient (outputs, inputs) of the base that the bundle's layer still has."""
    rows = gradient if kept.outputs is None else gradient[list(kept.outputs)]
    return rows if kept.inputs is None else rows[:, list(kept.inputs)]


def _products(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """The inner product of two gradients, and of each with itself."""
    left, right = one.double(), other.double()
    return float((left * right).sum()), float(left.square().sum()), float(right.square().sum())


def _cosine(product: float, left: float, right: float) -> float:
    """The cosine of two vectors, from their inner product and their squared norms; 0 if one of them is zero."""
    return product / math.sqrt(left * right) if left and right else 0.0
