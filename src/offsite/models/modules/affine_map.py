"""An affine layer on the hidden state after a block, which makes up for the blocks that were dropped after it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Affine(nn.Module):
    """Computes h + h W + b with W (H, H), inputs first, and b (H,); frozen."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def empty(cls, hidden: int) -> "Affine":
        """A map without numbers, to be given some."""
        return cls(torch.empty(hidden, hidden, device="meta"), torch.empty(hidden, device="meta"))

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer: (..., H) -> (..., H)."""
        return hidden + F.linear(hidden, self.weight.T, self.bias)


def stand_behind(block: nn.Module, affine: Affine) -> None:
    """Have a map stand behind a block, as its submodule `affine`.

    Args:
        block: of any family; whatever it gives beside the hidden state stays as it is.
        affine: the map.
    """
    block.register_module("affine", affine)
    # no module around the block: models ask their blocks for attributes, and tensors keep their names
    block.register_forward_hook(_mapped)


def _mapped(block: nn.Module, _: object, output: Any) -> Any:
    affine = block.get_submodule("affine")
    return (affine(output[0]), *output[1:]) if isinstance(output, tuple) else affine(output)
