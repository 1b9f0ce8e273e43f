"""The bottleneck adapter of Houlsby et al. (arXiv 1902.00751, section 2.1), placed after a linear layer."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """A bottleneck, x + W_up gelu(W_down x + b_down) + b_up; W_up and b_up start as 0, so it starts as the identity.

    `hidden` is the size H of x, and `width` the size of W_down x.
    """

    def __init__(self, hidden: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, dtype=dtype, device=device)
        self.up = nn.Linear(width, hidden, dtype=dtype, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, H)
        """Apply the bottleneck with its residual connection: (B, T, H) -> (B, T, H)."""
        made: torch.Tensor = self.up(F.gelu(self.down(x)))
        return x + made


class WithBottleneck(nn.Module):
    """A linear layer followed by a bottleneck; this module replaces the linear layer."""

    def __init__(self, inner: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.inner = inner
        self.bottleneck = bottleneck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the linear layer, then the bottleneck: (B, T, inputs) -> (B, T, H)."""
        made: torch.Tensor = self.bottleneck(self.inner(x))
        return made


def insert_bottlenecks(model: nn.Module, places: Iterable[str], hidden: int, width: int) -> dict[str, nn.Parameter]:
    """Insert untrained bottlenecks after linear layers of a model, in the dtype and on the device of each layer.

    Args:
        model: the model, changed in place.
        places: the full paths of the linear layers.
        hidden: the number of outputs of these layers.
        width: the width of the bottlenecks.

    Returns:
        The new parameters, by their names in the model.
    """
    made: dict[str, nn.Parameter] = {}
    for place in places:
        parent, _, name = place.rpartition(".")
        inner = model.get_submodule(place)
        # a quantised layer has floats in its buffers alone
        floats = (one for one in chain(inner.parameters(), inner.buffers()) if one.is_floating_point())
        weight = next(floats)
        bottleneck = Bottleneck(hidden, width, dtype=weight.dtype, device=weight.device)
        setattr(model.get_submodule(parent), name, WithBottleneck(inner, bottleneck))
        made |= {f"{place}.bottleneck.{path}": parameter for path, parameter in bottleneck.named_parameters()}
    return made
