"""Frozen linear layers that store their weight in a compressed form (quantised or factored), and sparse matrices.

Quantised weights are symmetric around zero, with one scale for each group of inputs. Two int4 values share a byte: the
even input is in the low half, and 8 is added so that values are not negative.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantisedLinear(nn.Module):
    """A linear layer y = x W^T + b with W in 8 or 4 bits; each forward and backward pass decodes W, then frees it.

    `group` is the number of inputs that share a scale; `bias` None: no bias.
    """

    quantised: Tensor  # (outputs, inputs) int8, or (outputs, inputs / 2) uint8
    scales: Tensor  # (outputs, groups)

    def __init__(self, quantised: Tensor, scales: Tensor, bias: Tensor | None, inputs: int, group: int) -> None:
        super().__init__()
        self.register_buffer("quantised", quantised)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features, self.out_features = inputs, len(quantised)
        self._group = group

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight matrix, (outputs, inputs)."""
        codes = self.quantised
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : self.in_features].to(torch.int8) - 8
        scales = self.scales.to(dtype).repeat_interleave(self._group, dim=1)[:, : self.in_features]
        return codes.to(dtype) * scales

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer: (..., inputs) -> (..., outputs)."""
        product: Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """The product x W^T; the backward pass decodes W again, as autograd would store every decoded W until then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(hidden, linear.weight_in(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.weight_in(gradients[0].dtype), None


class FactoredLinear(nn.Module):
    """A linear layer y = U D x + b: D (`down`) is (rank, inputs), U (`up`) is (outputs, rank); `bias` None: no b."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.in_features, self.out_features = down.shape[1], up.shape[0]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer: (..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(hidden, self.down), self.up, self.bias)


def unpacked(mask: Tensor, values: Tensor, inputs: int) -> Tensor | None:
    """Convert a matrix that is stored as a mask and its nonzero values to a full matrix.

    Args:
        mask: the positions of the stored values as bits, uint8 (outputs, inputs / 8 rounded up), first input in the
            lowest bit.
        values: the stored values, (count,), row after row.
        inputs: the number of columns of the matrix.

    Returns:
        The matrix (outputs, inputs) in the dtype of the values; None if the mask does not have `count` positions.
    """
    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    places = bits.flatten(1)[:, :inputs].bool()
    if int(places.sum()) != len(values):
        return None
    return torch.zeros(places.shape, dtype=values.dtype, device=values.device).masked_scatter_(places, values)
