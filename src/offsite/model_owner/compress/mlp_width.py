"""Narrower MLPs: only the neurons with the largest weights remain (FedPFT, arXiv 2404.11536). Torch-free."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import KeptFeatures, Narrowed
from offsite.models.block_widths import neuron_layers
from offsite.models.families.family import Architecture
from offsite.models.modules.declared import Declared

Array = npt.NDArray[np.float32]


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The number of neurons that remain in each MLP, in the field of `Declared` for it.

    Raises:
        IncompatibleError: a linear layer of the MLP has several outputs for each neuron.
    """
    family, shapes = model.family, {path: tensor.shape for path, tensor in model.block(0).items()}
    inner = shapes[f"{family.mlp_out}.weight"][0 if family.transposed else 1]
    outputs = {
        shapes[f"{path}.weight"][1 if family.transposed else 0] for path in neuron_layers(family, family.linears)
    }
    if outputs != {inner}:
        raise IncompatibleError(
            f"the feed-forward part of this {family.model_type} model cannot be narrowed",
            reasons=["mlp_width: one linear layer makes several outputs for each neuron of the feed-forward part"],
            next_step="leave mlp_width out; dropping, distilling and pruning work with this family",
        )
    return {"mlp_width": max(1, round((spec.compress.mlp_width or 1) * inner))}


def reshape(family: Architecture, read: Callable[[str], Array], declared: Declared) -> Callable[[str, Array], Array]:
    """Make a function that removes MLP neurons from any tensor of a block.

    Args:
        family: the model's row of the architecture table.
        read: reads a tensor of the base's block, given its path in the block; the weights of the MLP decide which
            neurons remain, at the first call.
        declared: the bundle's declaration, with the number of neurons that remain.

    Returns:
        A function of a tensor's path in the block and its values in the base; it returns the values that remain.
    """

    @functools.cache
    def kept() -> npt.NDArray[np.intp]:
        return choose_neurons(family, read, declared.mlp_width or 0)

    return lambda path, values: narrow(family, path, values, kept())


def kept_features(family: Architecture, read: Callable[[str], Array], declared: Declared) -> Narrowed:
    """The remaining inputs and outputs of each narrowed layer, keyed by the layer's path; arguments as for `reshape`.

    The remaining neurons are inputs of the MLP's output layer, and outputs of its other layers.
    """
    neurons = tuple(choose_neurons(family, read, declared.mlp_width or 0).tolist())
    outputs = dict.fromkeys(neuron_layers(family, family.linears), KeptFeatures(outputs=neurons))
    return {**outputs, family.mlp_out: KeptFeatures(inputs=neurons)}


def choose_neurons(family: Architecture, read: Callable[[str], Array], width: int) -> npt.NDArray[np.intp]:
    """The indices of the MLP neurons that remain in a block, in ascending order.

    They are those with the largest L2 norm of all their weights: their rows of the input layers and their column of the
    output layer.

    Args:
        family: the model's row of the architecture table.
        read: reads a tensor of the block, given its path in the block.
        width: number of neurons that remain.
    """
    squares = np.square(read(f"{family.mlp_out}.weight"), dtype=np.float64).sum(1 if family.transposed else 0)
    for path in neuron_layers(family, family.linears):
        squares = squares + np.square(read(f"{path}.weight"), dtype=np.float64).sum(0 if family.transposed else 1)
    return np.sort(np.argsort(-squares, kind="stable")[:width])


def narrow(family: Architecture, path: str, values: Array, kept: npt.NDArray[np.intp]) -> Array:
    """The values of a tensor without the rows or columns of removed MLP neurons; tensors without any are unchanged.

    Args:
        family: the model's row of the architecture table.
        path: the tensor's path in the block.
        values: its values in the base, with the layout of checkpoint files.
        kept: the indices of the neurons that remain.
    """
    module, _, kind = path.rpartition(".")
    if module == family.mlp_out and kind == "weight":
        return values[kept] if family.transposed else values[:, kept]
    if module in neuron_layers(family, family.linears):
        return values[kept] if kind == "bias" else values[:, kept] if family.transposed else values[kept]
    return values
