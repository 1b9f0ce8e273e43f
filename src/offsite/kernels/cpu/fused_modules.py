"""RMS norms, activations and gated MLPs that store less for the backward pass and read memory less often.

transformers writes these as chains of small operations, each of which stores its input: an RMS norm stores the hidden
state twice in fp32, a gated MLP three tensors of its inner width, the GELU of GPT-2 six. Here each is one autograd
function with its own gradient; in bf16 it runs compiled kernels if there are any. Parameters keep their names, so
adapters and returns are not affected.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.cpu import compiled_kernels as kernels
from offsite.kernels.replace_modules import Candidate, replace_modules, same_function
from offsite.kernels.replacement_report import MLPS, NORMS, Piece

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_STEEPNESS = 1.702
_GELUS = "GELU activations"  # name in the report


def _gelu(given: torch.Tensor) -> torch.Tensor:
    """Compute GELU in its tanh form, by a compiled kernel if possible."""
    return kernels.gelu(given) if kernels.activates(given) else F.gelu(given, approximate="tanh")


def _gelu_back(grad_output: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the input of `_gelu` from the gradient of its output."""
    if kernels.activates(given):
        return kernels.gelu_back(grad_output, given)
    slope: torch.Tensor = torch.ops.aten.gelu_backward(grad_output, given, approximate="tanh")
    return slope


# an activation: (its function, the gradient of its input from (grad_output, input))
_Gate = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
_SILU: _Gate = (F.silu, torch.ops.aten.silu_backward)
_TANH_GELU: _Gate = (_gelu, _gelu_back)
_QUICK_GELU: _Gate = (  # silu(a x) / a, whose slope is that of silu at a x
    lambda given: F.silu(given * _STEEPNESS, inplace=True).div_(_STEEPNESS),
    lambda grad_output, given: torch.ops.aten.silu_backward(grad_output, given * _STEEPNESS),
)
_GATES = (_SILU, _TANH_GELU)


def fuse(model: nn.Module) -> tuple[Piece, ...]:
    """Replace a model's RMS norms, gated MLPs and GELUs in place by fused ones; call it before adapters are attached.

    Returns:
        One entry for the report of the kernels for each of the three kinds of modules.
    """
    return replace_modules(model, _candidates, (NORMS, MLPS, _GELUS))


def _candidates(module: nn.Module) -> Iterator[Candidate]:
    """Yields fused modules that might compute the same as `module`, according to the names of its parts."""
    children, own = dict(module.named_children()), dict(module.named_parameters(recurse=False))
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(children) == set(_GATED) and not own:
        for gate in (gate for gate in _GATES if same_function(children["act_fn"], gate[0])):
            mlp = GatedMLP(children["gate_proj"], children["up_proj"], children["down_proj"], gate)
            yield Candidate(MLPS, mlp)
    elif not children and set(own) == {"weight"} and own["weight"].dim() == 1 and isinstance(epsilon, float):
        for offset in (0.0, 1.0):
            yield Candidate(NORMS, RMSNorm(own["weight"], epsilon, offset))
    elif not children and not own and "GELU" in type(module).__name__:
        yield Candidate(_GELUS, TanhGELU())
        yield Candidate(_GELUS, QuickGELU())


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) (arXiv 1910.07467); the offset is 1 in Gemma, otherwise 0."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self._epsilon, self._offset = weight, epsilon, offset

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise hidden states, (..., H) -> (..., H); sums are in fp32, as in the modules of transformers."""
        normed: torch.Tensor = _RMSNorm.apply(hidden, self.weight, self._epsilon, self._offset)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    """Autograd function of `RMSNorm`; stores the hidden state in its own dtype, and one number per token."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> torch.Tensor:
        ctx.compiled = not offset and not ctx.needs_input_grad[1] and kernels.activates(hidden, weight)
        if ctx.compiled:
            normed, scale = kernels.rms_norm(hidden, weight, epsilon)
            ctx.save_for_backward(hidden, weight, scale)
            return normed
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32), copy=True)
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()  # (..., 1)
        scale = square.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        ctx.offset = offset
        wide.mul_(scale)
        if offset:  # families with an offset round once, after the product with the weight
            return wide.mul_(weight.to(wide.dtype) + offset).to(hidden.dtype)
        return wide.to(hidden.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        if ctx.compiled:
            return kernels.rms_norm_back(gradients[0], scale, hidden, weight), None, None, None
        normed = hidden.to(scale.dtype, copy=True).mul_(scale)  # (..., H)
        grad_output = gradients[0].to(scale.dtype)
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (grad_output * normed).flatten(0, -2).sum(0).to(weight.dtype)
        slope = grad_output * (weight.to(scale.dtype) + ctx.offset)
        along = (slope * normed).mean(-1, keepdim=True)  # (..., 1), the part in the direction of x, which has no effect
        return slope.sub_(normed.mul_(along)).mul_(scale).to(hidden.dtype), for_weight, None, None


class TanhGELU(nn.Module):
    """GELU in its tanh form, as in GPT-2; stores only its input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to a tensor of any shape."""
        after: torch.Tensor = _Activated.apply(hidden, _TANH_GELU)  # type: ignore[no-untyped-call]
        return after


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) (arXiv 1606.08415, section 2), as in CLIP; stores only its input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation to a tensor of any shape."""
        after: torch.Tensor = _Activated.apply(hidden, _QUICK_GELU)  # type: ignore[no-untyped-call]
        return after


class _Activated(torch.autograd.Function):
    """Autograd function of an activation; stores only its input."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, activation: _Gate) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        value, ctx.slope = activation
        return value(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        return ctx.slope(gradients[0], hidden), None


class GatedMLP(nn.Module):
    """A gated MLP down(act(gate(x)) * up(x)) (arXiv 2002.05202); its linear layers have the names of Llama's."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, activation: _Gate) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self._activation = gate, up, down, activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the MLP on hidden states, (..., H) -> (..., H)."""
        gated = _Gated.apply(self.gate_proj(hidden), self.up_proj(hidden), self._activation)  # type: ignore[no-untyped-call]
        after: torch.Tensor = self.down_proj(gated)
        return after


class _Gated(torch.autograd.Function):
    """Autograd function of act(gate) * up; stores only `gate` and `up`, and computes act(gate) again."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: _Gate) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        if activation is _SILU and kernels.activates(gate, up):
            return kernels.gated(gate, up)
        return activation[0](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.activation is _SILU and kernels.activates(gate, up):
            return *kernels.gated_back(gradients[0], gate, up), None
        value, slope = ctx.activation
        return slope(gradients[0] * up, gate), value(gate).mul_(gradients[0]), None
