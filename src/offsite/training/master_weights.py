"""Trained weights in two precisions: fp32 master weights for the optimiser, and working copies for the network.

In bf16 the network's own parameters are the working copies, cast once per step. torch's autocast would cast them at
each use, and would also cast every fp32 activation. Gradients of micro-batches are summed in fp32 (Micikevicius et al.,
arXiv 1710.03740, section 3.1).
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn


class MasterWeights:
    """The parameters that train, by name, each with its fp32 master weight.

    Args:
        working: the network's own parameters, under names that are unique in the run; its resume points use them too.
        decayed: the names of the parameters with weight decay; usually matrices, never norms or biases.
        rate_factors: factors of the learning rate, by name; a name without an entry has the factor 1.
        fixed: boolean masks of entries that must not change (such as zeros of a pruned matrix), by name.
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
        """Add the gradients of the working parameters to those of the master weights, and set the former to None."""
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
        """Scale all gradients to a total norm of at most `max_norm`.

        Before that, the gradients of entries that must not change (`fixed`) are set to zero.

        Returns:
            The norm before the scaling.
        """
        for name, mask in self._fixed.items():
            gradient = self.masters[name].grad
            if gradient is not None:
                gradient.masked_fill_(mask, 0)
        return float(nn.utils.clip_grad_norm_(self.masters.values(), max_norm))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights to the network's working parameters."""
        pairs = [(self.working[name], master) for name, master in self.masters.items()]
        apart = [(working, master) for working, master in pairs if working is not master]
        if apart:
            torch._foreach_copy_([working for working, _ in apart], [master for _, master in apart])

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore saved master weights, and copy them to the working parameters."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.publish()
