"""LoRA pairs that run as one function with the map beside them: PEFT's own make three tensors as wide as its output.

The pair's product is added into the map's output where it lies, forwards and backwards, and the scale is put on the
narrow state between A and B. What comes out is PEFT's, rounded once where that rounds three times.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.cpu.fused_modules import agree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"  # the name under which PEFT attaches


def replace_lora_layers(model: "PreTrainedModel") -> int:
    """Replace PEFT's layers by lean ones that hold the same parameters, where they are plain LoRA without dropout.

    Returns:
        How many layers were replaced.
    """
    from peft.tuners.lora import Linear

    replaced = 0
    for path, layer in list(model.named_modules()):
        if type(layer) is not Linear or layer.lora_variant:
            continue
        base, pair = layer.base_layer, (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER])
        weights = [half.weight for half in (base, *pair)]
        lean = FusedLoraLinear(base, *pair, layer.scaling[_ADAPTER], transposed=layer.fan_in_fan_out)
        if (
            isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
            and not weights[0].requires_grad
            and all(weight.dtype == weights[0].dtype for weight in weights)
            and agree(layer, lean, pair[0].in_features)
        ):
            model.set_submodule(path, lean.train(layer.training))
            replaced += 1
    return replaced


class FusedLoraLinear(nn.Module):
    """W x + b + scale * B A x (arXiv 2106.09685, section 4.1) with W and b frozen."""

    def __init__(
        self, base_layer: nn.Module, lora_a: nn.Module, lora_b: nn.Module, scale: float, *, transposed: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base_layer, lora_a, lora_b
        self._scale, self._transposed = scale, transposed

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight = self.base_layer.weight.T if self._transposed else self.base_layer.weight  # (out, in)
        flat = hidden.flatten(0, -2)  # (N, in)
        after: torch.Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            flat, weight, self.base_layer.bias, self.lora_A.weight, self.lora_B.weight, self._scale
        )
        return after.view(*hidden.shape[:-1], after.shape[-1])


class _FusedLora(torch.autograd.Function):
    """Keeps its input and the narrow state."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        into: torch.Tensor,  # A: (rank, in)
        out_of: torch.Tensor,  # B: (out, rank)
        scale: float,
    ) -> torch.Tensor:
        narrow = F.linear(hidden, into).mul_(scale)  # (N, rank)
        ctx.save_for_backward(hidden, weight, into, out_of, narrow)
        ctx.scale = scale
        return F.linear(hidden, weight, bias).addmm_(narrow, out_of.T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, into, out_of, narrow = ctx.saved_tensors
        above = gradients[0]  # (N, out)
        of_narrow = (above @ out_of).mul_(ctx.scale)  # (N, rank)
        of_hidden = (above @ weight).addmm_(of_narrow, into) if ctx.needs_input_grad[0] else None
        return of_hidden, None, None, of_narrow.T @ hidden, above.T @ narrow, None
