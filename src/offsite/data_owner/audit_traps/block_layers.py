"""The layers of a block as the audit reads them: linear layers with their full weight, experts, and vectors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offsite.models.blocks import unwrapped_block
from offsite.models.families.family import Architecture
from offsite.models.mixture import expert_matrices
from offsite.models.modules.compressed_linear import FactoredLinear, QuantisedLinear


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block; `weight` makes it in float32, (outputs, inputs), each time that it is called."""

    path: str  # path in the block of the torch model
    weight: Callable[[], Tensor]
    bias: Tensor | None  # (outputs,), None: no bias
    module: nn.Module | None  # the linear layer; None for the matrix of an expert, which is called with its stack


def matrices_of(block: nn.Module, family: Architecture) -> list[Matrix]:
    """All matrices of a block: of linear layers in any stored form, of routers and of experts."""
    found = []
    for path, module in unwrapped_block(block).named_modules():
        weight = _weight_of(module)
        if weight is not None:
            bias = getattr(module, "bias", None)
            found.append(Matrix(path, weight, bias.detach() if isinstance(bias, Tensor) else None, module))
        elif family.experts is not None and path == family.experts.module:
            for number, matrices in enumerate(expert_matrices(family, module)):
                found += [Matrix(f"{path}.{number}.{name}", one.float, None, None) for name, one in _short(matrices)]
    return found


def vectors_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The path and the values of each vector of a block: biases, and weights of norms."""
    for path, parameter in unwrapped_block(block).named_parameters():
        if parameter.dim() == 1:
            yield path, parameter.detach()


def _short(matrices: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The matrices of an expert with the last part of their names."""
    for name, matrix in matrices.items():
        yield name.rpartition(".")[2], matrix


def _weight_of(module: Any) -> Callable[[], Tensor] | None:
    """A function that makes the weight of a linear layer, (outputs, inputs) in float32; None for other modules."""
    if isinstance(module, QuantisedLinear):
        return lambda: module.weight_in(torch.float32)
    if isinstance(module, FactoredLinear):
        return lambda: module.up.detach().float() @ module.down.detach().float()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    transposed = hasattr(module, "nf")  # GPT-2's Conv1D stores (inputs, outputs)
    return lambda: (weight.detach().T if transposed else weight.detach()).float()
