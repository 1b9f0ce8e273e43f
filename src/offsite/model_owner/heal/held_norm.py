"""A norm whose statistics are held: linear in its input, so a layer in front of it can be solved in closed form.

RMSNorm and LayerNorm give gain * (x - mean) / deviation + bias. While each token's mean and deviation are held at the
values that they have, a change of x changes the output by gain / deviation times itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class HeldNorm:
    """The response of a norm's output to its input; tensors are in float32."""

    gain: Tensor  # (H,)
    inverse: Tensor  # (N, 1): 1 / deviation of each token
    normalised: Tensor  # (N, H): (x - mean) / deviation


def hold_norm(norm: nn.Module, inputs: Tensor) -> HeldNorm:
    """Hold the statistics of a norm for its inputs (..., H).

    Nothing is assumed of the module but that it is an RMSNorm or a LayerNorm: whether its gain is its weight, or 1 plus
    its weight as in Gemma, or fixed, shows in its outputs.
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
