"""RMS norms and gated MLPs of liger-kernel (arXiv 2410.10989), if it is installed and they compute the same."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.replace_modules import Candidate, replace_modules, same_function
from offsite.kernels.replacement_report import MLPS, NORMS, Piece

_FUNCTIONS = "liger_kernel.transformers.functional"
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_tanh_gelu = partial(F.gelu, approximate="tanh")


def use_liger(model: nn.Module) -> tuple[Piece, ...]:
    """Replace RMS norms and gated MLPs of a model in place by kernels of liger-kernel.

    A module is replaced only if its output and the kernel's are the same for random inputs.

    Returns:
        One entry for the report of the kernels for norms, and one for MLPs.
    """
    try:
        functions = importlib.import_module(_FUNCTIONS)
    except ImportError:
        reason = "liger-kernel is not installed: pip install liger-kernel"
        return Piece(NORMS, 0, reason), Piece(MLPS, 0, reason)
    return replace_modules(model, partial(_candidates, functions), (NORMS, MLPS))


def _candidates(functions: Any, module: nn.Module) -> Iterator[Candidate]:
    """Yields modules of liger-kernel that might compute the same as `module`, according to the names of its parts."""
    children, own = dict(module.named_children()), dict(module.named_parameters(recurse=False))
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if children.keys() == _GATED and not own:
        for activation, product in ((F.silu, functions.liger_swiglu), (_tanh_gelu, functions.liger_geglu)):
            if same_function(children["act_fn"], activation):
                parts = children["gate_proj"], children["up_proj"], children["down_proj"]
                yield Candidate(MLPS, LigerGatedMLP(*parts, product))
    elif not children and own.keys() == {"weight"} and own["weight"].dim() == 1 and isinstance(epsilon, float):
        for offset, casting in ((0.0, "llama"), (1.0, "gemma")):
            yield Candidate(NORMS, LigerRMSNorm(own["weight"], epsilon, offset, casting, functions.liger_rms_norm))


class LigerRMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) (arXiv 1910.07467) as one kernel of liger-kernel; its weight keeps its name.

    `casting` is liger-kernel's casting mode, which says what is computed in fp32; `function` is its kernel.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        epsilon: float,
        offset: float,
        casting: str,
        function: Callable[..., torch.Tensor],
    ) -> None:
        super().__init__()
        self.weight = weight
        self._run = partial(function, eps=epsilon, offset=offset, casting_mode=casting, in_place=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise hidden states, (..., H) -> (..., H)."""
        return self._run(hidden, self.weight)


class LigerGatedMLP(nn.Module):
    """A gated MLP down(act(gate(x)) * up(x)) (arXiv 2002.05202) with one kernel for act(gate(x)) * up(x).

    `product` is that kernel, from (gate(x), up(x)). The linear layers keep their names.
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self._product = gate, up, down, product

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the MLP on hidden states, (..., H) -> (..., H)."""
        after: torch.Tensor = self.down_proj(self._product(self.gate_proj(hidden), self.up_proj(hidden)))
        return after
