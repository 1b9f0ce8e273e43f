"""Linear layers that store less than a full matrix (quantised, factorised or sparse). All are frozen.

Quantised weights are symmetric around zero with a scale for each group of inputs; int4 lies two to a byte, the even
input in the low half, with 8 added so that it is not negative.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuantisedLinear(nn.Module):
    """y = x W^T + b with W in 8 or 4 bits; W is made for a product and is gone after it, forwards and backwards."""

    quantised: Tensor  # (outputs, inputs) int8, or (outputs, inputs / 2) uint8
    scales: Tensor  # (outputs, groups)

    def __init__(self, quantised: Tensor, scales: Tensor, bias: Tensor | None, inputs: int, group: int) -> None:
        super().__init__()
        self.register_buffer("quantised", quantised)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._inputs, self._group = inputs, group

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The matrix that is stood for, (outputs, inputs)."""
        codes = self.quantised
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : self._inputs].to(torch.int8) - 8
        scales = self.scales.to(dtype).repeat_interleave(self._group, dim=1)[:, : self._inputs]
        return codes.to(dtype) * scales

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        product: Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x W^T that makes W anew for the gradient, where autograd would keep every matrix until then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(hidden, linear.weight_in(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.linear.weight_in(gradients[0].dtype), None


class FactoredLinear(nn.Module):
    """y = U D x + b: a matrix of low rank as its two factors, D (rank, inputs) and U (outputs, rank)."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(hidden, self.down), self.up, self.bias)


def unpacked(mask: Tensor, values: Tensor, inputs: int) -> Tensor | None:
    """Expand a sparse matrix to a dense one.

    Args:
        mask: where numbers stand, uint8 (outputs, inputs / 8 rounded up), the first input in the lowest bit.
        values: the numbers, (count,), row after row.
        inputs: columns of the matrix.

    Returns:
        (outputs, inputs) in the dtype of the values; None where the mask has another number of places.
    """
    bits = mask[..., None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    places = bits.flatten(1)[:, :inputs].bool()
    if int(places.sum()) != len(values):
        return None
    return torch.zeros(places.shape, dtype=values.dtype, device=values.device).masked_scatter_(places, values)
