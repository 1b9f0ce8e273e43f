"""Trained weights in two precisions: fp32 masters that the optimiser moves, and working copies that the network runs.

With bf16 the network's own parameters are the working copies. They are cast once a step; autocast would cast them at
each use, and every fp32 activation too. Gradients of micro-batches add up in fp32 (Micikevicius et al.,
arXiv 1710.03740, section 3.1).
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn


class MasterWeights:
    """The parameters that train, by the names under which they are returned.

    Args:
        working: the network's own parameters.
        decayed: names of those that decay; usually matrices, and no norm or bias.
        rate_factors: names whose learning rate is another one, and the factor.
        fixed: by name, a mask of entries that do not change, such as the zeros of a pruned matrix.
    """

    def __init__(
        self,
        working: Mapping[str, nn.Parameter],
        *,
        decayed: Collection[str] = (),
        rate_factors: Mapping[str, float] | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.working = dict(working)
        self.masters: dict[str, torch.Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.working.items()
        }
        self.decayed = frozenset(decayed)
        self.rate_factors = dict(rate_factors or {})
        self._fixed = dict(fixed or {})

    def collect_gradients(self) -> None:
        """Add the gradients that a backward pass left with the working parameters to the masters'."""
        for name, parameter in self.working.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def clip_gradients(self, max_norm: float) -> float:
        """Zero the gradients of fixed entries, and scale all gradients to at most this norm together.

        Returns:
            The norm before scaling.
        """
        for name, mask in self._fixed.items():
            gradient = self.masters[name].grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)
        return float(nn.utils.clip_grad_norm_(self.masters.values(), max_norm))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the network's working parameters."""
        pairs = [(self.working[name], master) for name, master in self.masters.items()]
        apart = [(working, master) for working, master in pairs if working is not master]
        if apart:
            torch._foreach_copy_([working for working, _ in apart], [master for _, master in apart])

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take over masters that were saved."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()
