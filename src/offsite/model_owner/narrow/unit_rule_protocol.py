"""The input of a rule that removes units from a block, and the function that each rule's file must define.

A unit is an MLP neuron, or a key-value head with its query heads (a single query head if the block has only one
key-value head). It changes the hidden state only through its columns of one output projection. A unit can also be an
expert of a mixture, whose outputs take the place of the projection's inputs (`expert_problem.py`).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from offsite.config import UnitRule

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01  # times the mean of a matrix's diagonal, added to it so that it has an inverse


@dataclass(frozen=True)
class UnitProblem:
    """The output projection of a block's attention or MLP, with statistics of its inputs; tensors are in float64."""

    gram: "Tensor"  # (F, F): the weighted sum of x x^T over the tokens' inputs x
    weight: "Tensor"  # (H, F), times the learned scale that follows it in the block, if there is one
    size: int  # number of inputs of each unit; they are consecutive
    # for rules that need them, `loss_statistics.LossStatistics` of the block:
    metric: "Tensor | None" = None  # (H, H), by which changes of the hidden state count
    gradient: "Tensor | None" = None  # (H, F), of the loss with respect to the projection

    @property
    def units(self) -> int:
        """The number of units: key-value heads (or query heads) of attention, or neurons of the MLP."""
        return self.gram.shape[0] // self.size

    @property
    def weighted(self) -> "Tensor":
        """The weight (H, F) times a root of the metric, so that squared norms of changes are those in the metric."""
        import torch

        if self.metric is None:
            return self.weight
        damping = DAMPING * self.metric.diagonal().mean().clamp_min(1e-30)
        root: Tensor = torch.linalg.cholesky(self.metric + damping * torch.eye(len(self.metric)).to(self.metric))
        return root.T @ self.weight


@runtime_checkable
class UnitOrdering(Protocol):
    """Protocol of rules that find the least important units of a block; each rule is a Python file of this folder."""

    def order_units(self, problem: UnitProblem, stay: int) -> list[int]:
        """The indices of the units to remove, in the order of removal, so that `stay` units remain."""


def ordering(row: UnitRule) -> UnitOrdering:
    """Import the Python file of a rule, which imports torch."""
    return cast(UnitOrdering, import_module(row.module))
