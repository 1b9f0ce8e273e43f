"""A LoRA layer that computes the adapter and its linear layer in one function, with less memory than PEFT's.

The product of the LoRA matrices A and B is added to the layer's output in place, in both passes. The scale is applied
to the narrow state between A and B, whose width is the rank. Results equal PEFT's, but are rounded once where PEFT
rounds three times.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.replace_modules import agree
from offsite.kernels.replacement_report import ABSENT, LORA, Piece

if TYPE_CHECKING:
    from peft.tuners.lora import Linear

_ADAPTER = "default"  # the name that PEFT gives an adapter


def replace_lora_layers(model: nn.Module) -> Piece:
    """Replace PEFT's LoRA layers in a model by fused layers with the same parameters.

    Only plain LoRA without dropout is replaced.

    Returns:
        The entry for the report of the kernels: how many layers were replaced, and why the others were not.
    """
    from peft.tuners.lora import Linear

    layers = {path: layer for path, layer in model.named_modules() if type(layer) is Linear}
    reasons: Counter[str] = Counter()
    for path, layer in layers.items():
        why_not = _why_not(layer)
        if why_not:
            reasons[why_not] += 1
            continue
        model.set_submodule(path, _fused(layer).train(layer.training))
    if not layers:
        return Piece(LORA, 0, ABSENT)
    return Piece(LORA, len(layers) - reasons.total(), "; ".join(reasons) or "same results on random numbers")


def _fused(layer: "Linear") -> "FusedLoraLinear":
    """Make the fused layer with the parameters of a LoRA layer of PEFT."""
    parts = layer.base_layer, layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    return FusedLoraLinear(*parts, layer.scaling[_ADAPTER], transposed=layer.fan_in_fan_out)


def _why_not(layer: "Linear") -> str:
    """The reason why a LoRA layer of PEFT cannot be replaced; empty if it can."""
    base, into = layer.base_layer, layer.lora_A[_ADAPTER]
    if layer.lora_variant:
        return "a variant of LoRA"
    if not isinstance(getattr(base, "weight", None), nn.Parameter):
        return "the layer's weight is stored in a compressed form"
    if not isinstance(layer.lora_dropout[_ADAPTER], nn.Identity):
        return "they use dropout"
    if base.weight.requires_grad:
        return "the layer's own weights train"
    if {half.weight.dtype for half in (into, layer.lora_B[_ADAPTER])} != {base.weight.dtype}:
        return "the LoRA matrices have another dtype than the layer"
    return "" if agree(layer, _fused(layer), into.in_features) else "the layer computes something else"


class FusedLoraLinear(nn.Module):
    """A linear layer with LoRA, W x + b + scale * B A x (arXiv 2106.09685, section 4.1), with W and b frozen.

    `transposed`: whether `base_layer` stores W as (in, out), as GPT-2's Conv1D does.
    """

    def __init__(
        self, base_layer: nn.Module, lora_a: nn.Module, lora_b: nn.Module, scale: float, *, transposed: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base_layer, lora_a, lora_b
        self._scale, self._transposed = scale, transposed

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight; some models ask for its device."""
        found: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        return found

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the linear layer with LoRA, (..., in) -> (..., out)."""
        weight = self.base_layer.weight.T if self._transposed else self.base_layer.weight  # (out, in)
        flat = hidden.flatten(0, -2)  # (N, in)
        after: torch.Tensor = _FusedLora.apply(  # type: ignore[no-untyped-call]
            flat, weight, self.base_layer.bias, self.lora_A.weight, self.lora_B.weight, self._scale
        )
        return after.view(*hidden.shape[:-1], after.shape[-1])


class _FusedLora(torch.autograd.Function):
    """Autograd function of `FusedLoraLinear`; stores its input and the narrow state between A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (N, in)
        weight: torch.Tensor,  # (out, in)
        bias: torch.Tensor | None,  # (out,)
        weight_a: torch.Tensor,  # (rank, in)
        weight_b: torch.Tensor,  # (out, rank)
        scale: float,
    ) -> torch.Tensor:
        narrow = F.linear(hidden, weight_a).mul_(scale)  # (N, rank)
        ctx.save_for_backward(hidden, weight, weight_a, weight_b, narrow)
        ctx.scale = scale
        return F.linear(hidden, weight, bias).addmm_(narrow, weight_b.T)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, weight_a, weight_b, narrow = ctx.saved_tensors
        grad_output = gradients[0]  # (N, out)
        of_narrow = (grad_output @ weight_b).mul_(ctx.scale)  # (N, rank)
        of_hidden = (grad_output @ weight).addmm_(of_narrow, weight_a) if ctx.needs_input_grad[0] else None
        return of_hidden, None, None, of_narrow.T @ hidden, grad_output.T @ narrow, None
