"""What the file of a pruner has: one function for weights that are stored, or three for a pass on calibration data."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from offsite.config import Pruner
from offsite.model_owner.compress.zeros import Array, without_smallest

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class StoredPruner(Protocol):
    """A file of this folder with a pruner that looks at a matrix alone, when it is stored."""

    def prune_stored(self, weight: Array, share: float) -> Array:
        """A matrix, in the layout of its file, with `share` of its weights set to zero."""


@runtime_checkable
class CalibratedPruner(Protocol):
    """A file of this folder with a pruner that looks at what enters a linear layer, in the pass over the blocks."""

    def sum_inputs(self, inputs: "Tensor") -> "Tensor":
        """What the pruner has to know of inputs (N, I), as a sum over the N: those of several batches are added."""

    def from_gram(self, gram: "Tensor") -> "Tensor":
        """The same, of inputs of which the Gram matrix (I, I) is known."""

    def prune_matrices(self, weights: Mapping[str, "Tensor"], sums: "Tensor", share: float) -> Mapping[str, "Tensor"]:
        """Prune matrices (outputs, I) of linear layers that read the same inputs.

        Args:
            weights: by the layers' paths.
            sums: what `sum_inputs` or `from_gram` gave.
            share: of the weights of each that become zero.

        Returns:
            The new matrices in float32, by the same paths.
        """


@dataclass(frozen=True)
class Pruning:
    """A calibrated pruner at work."""

    row: Pruner
    pruner: CalibratedPruner
    share: float  # of each matrix that becomes zero

    def prune(self, weight: "Tensor", gram: "Tensor") -> "Tensor":
        """One matrix (outputs, I) without `share` of its weights, on inputs with this Gram matrix (I, I)."""
        return self.pruner.prune_matrices({"": weight}, self.pruner.from_gram(gram), self.share)[""]


def pruning(row: Pruner, share: float) -> Pruning:
    """A calibrated pruner with the share that it is to remove; imports torch."""
    return Pruning(row, cast(CalibratedPruner, import_module(row.module)), share)


def prune_stored(row: Pruner, weight: Array, share: float, inputs_axis: int) -> Array:
    """A matrix as it is stored.

    What a calibrated pruner did stays: its zeros are the smallest weights. Where a matrix has too few of them, because
    the feed-forward part became narrower, the smallest others go too.

    Args:
        row: the pruner's.
        weight: the matrix, in the layout of its file.
        share: of the weights that become zero.
        inputs_axis: the axis of the matrix that counts the layer's inputs.
    """
    if row.calibrated:
        return without_smallest(weight, share, inputs_axis if row.by_output else None)
    return cast(StoredPruner, import_module(row.module)).prune_stored(weight, share)
