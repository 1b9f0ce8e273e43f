"""An affine layer on the hidden state after a transformer block, which replaces the blocks that were dropped there."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """The frozen affine layer h -> h + h W + b, with W (H, H) stored as (inputs, outputs), and b (H,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, hidden: int) -> "Affine":
        """Construct a layer on the meta device, whose weight and bias are assigned later."""
        return cls(torch.empty(hidden, hidden, device="meta"), torch.empty(hidden, device="meta"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer to hidden states: (..., H) -> (..., H)."""
        return hidden + F.linear(hidden, self.weight.T, self.bias)


def stand_behind(block: nn.Module, affine: Affine) -> None:
    """Apply an affine layer to the output of a block, by a forward hook; the layer becomes the submodule `affine`.

    Args:
        block: a transformer block of any family, changed in place; its outputs other than the hidden state remain the
            same.
        affine: the layer.
    """
    block.register_module("affine", affine)
    # a hook, not a module around the block: models read attributes of their blocks, and tensors keep their names
    block.register_forward_hook(_mapped)


def _mapped(block: nn.Module, _: object, output: Any) -> Any:
    """Forward hook: apply the block's submodule `affine` to the hidden state in its output."""
    affine = block.get_submodule("affine")
    return (affine(output[0]), *output[1:]) if isinstance(output, tuple) else affine(output)
