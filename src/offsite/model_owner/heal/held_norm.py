"""Treats a norm as linear by fixing its statistics, so that a layer before it can be solved in closed form.

RMSNorm and LayerNorm compute gain * (x - mean) / deviation + bias, where RMSNorm has no mean and no bias. If each
token's mean and deviation stay fixed at their current values, a change of x changes the output by the same change times
gain / deviation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class HeldNorm:
    """The gain of a norm, and its statistics for N tokens, which are treated as constants; tensors are in float32."""

    gain: Tensor  # (H,)
    inverse: Tensor  # (N, 1): 1 / deviation of each token
    normalised: Tensor  # (N, H): (x - mean) / deviation


def hold_norm(norm: nn.Module, inputs: Tensor) -> HeldNorm:
    """Compute the gain and the statistics of a norm for its inputs (..., H).

    The module can be any RMSNorm or LayerNorm. Whether its gain is its weight, 1 plus its weight as in Gemma, or 1, is
    found from its outputs.
    """
    rows = inputs.flatten(0, -2).float()  # (N, H)
    weight = dict(norm.named_parameters()).get("weight")
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if weight is None:
            normalised, gain = norm(rows).float(), rows.new_ones(rows.shape[-1])
        else:
            zeros = {name: torch.zeros_like(value) for name, value in norm.named_parameters()}
            least = functional_call(norm, zeros, (rows,)).float()
            normalised = functional_call(norm, {**zeros, "weight": torch.ones_like(weight)}, (rows,)).float() - least
            offset = (least * normalised).sum() / normalised.square().sum().clamp_min(1e-12)  # 0, or 1 as in Gemma
            gain = offset + weight.detach().float()
        inverse = _centred(normalised).norm(dim=-1, keepdim=True) / _centred(rows).norm(dim=-1, keepdim=True).clamp_min(
            1e-12
        )
    return HeldNorm(gain, inverse, normalised)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
