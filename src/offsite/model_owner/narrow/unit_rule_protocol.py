"""The problem of removing units from a block, and the function that the file of a rule defines.

A unit is an MLP neuron, or the attention heads of a key-value head. All that a unit gives to the hidden state passes
through its columns of one output projection.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from offsite.config import UnitRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UnitProblem:
    """The output projection of a block's attention or MLP, with statistics of its inputs; tensors are in float64."""

    gram: "Tensor"  # (F, F): the weighted sum of x x^T over the tokens
    weight: "Tensor"  # (H, F), times the scale behind it in the block, if there is one
    size: int  # inputs of each unit; those of a unit are consecutive

    @property
    def units(self) -> int:
        """The number of units."""
        return self.gram.shape[0] // self.size


@runtime_checkable
class UnitOrdering(Protocol):
    """A file of this folder with a rule that says which units of a block matter least."""

    def order_units(self, problem: UnitProblem, stay: int) -> list[int]:
        """The units that are removed, in that order, until `stay` units are left."""


def ordering(row: UnitRule) -> UnitOrdering:
    """Load the file of a rule; imports torch."""
    return cast(UnitOrdering, import_module(row.module))
