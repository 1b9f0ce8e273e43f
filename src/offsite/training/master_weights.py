"""Trained weights in two precisions: fp32 masters that the optimiser moves, and working copies that the network runs.

Under bf16 the network's own parameters are the working copies: they are cast once a step, where autocast would cast
them and every fp32 activation beside them at each use. Gradients of micro-batches add up in fp32 (Micikevicius et al.,
arXiv 1710.03740, section 3.1).
"""

from collections.abc import Mapping

import torch
from torch import nn


class TrainedWeights:
    """The parameters that train, by the names under which they are returned."""

    def __init__(self, working: Mapping[str, nn.Parameter]) -> None:
        self.working = dict(working)
        self.masters: dict[str, torch.Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float()
            for name, parameter in self.working.items()
        }

    def collect_gradients(self) -> None:
        """Add the gradients that a backward pass left with the parameters to the masters'."""
        for name, parameter in self.working.items():
            if self.masters[name] is not parameter:
                _add(self.masters[name], parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the network what the masters now are."""
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


def _add(master: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if master.grad is None:
        master.grad = gradient.to(master.dtype, copy=True)  # two parameters may have been given one tensor
    else:
        master.grad += gradient
