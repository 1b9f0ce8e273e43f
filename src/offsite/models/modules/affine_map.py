"""An affine map of the hidden state after a block, which replaces the blocks that were dropped after it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """The frozen map h -> h + h W + b, with W (H, H) stored as (inputs, outputs), and b (H,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, hidden: int) -> "Affine":
        """Construct a map on the meta device, whose weight and bias are assigned later."""
        return cls(torch.empty(hidden, hidden, device="meta"), torch.empty(hidden, device="meta"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the map: (..., H) -> (..., H)."""
        return hidden + F.linear(hidden, self.weight.T, self.bias)


def stand_behind(block: nn.Module, affine: Affine) -> None:
    """Apply a map to the output of a block, by a forward hook; the map becomes the block's submodule `affine`.

    Args:
        block: a block of any family, changed in place; its outputs other than the hidden state do not change.
        affine: the map.
    """
    block.register_module("affine", affine)
    # no module around the block: models ask their blocks for attributes, and tensors keep their names
    block.register_forward_hook(_mapped)


def _mapped(block: nn.Module, _: object, output: Any) -> Any:
    affine = block.get_submodule("affine")
    return (affine(output[0]), *output[1:]) if isinstance(output, tuple) else affine(output)
