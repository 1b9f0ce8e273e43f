"""The functions that a pruner's file must define: one for a pruner without calibration data, three for one with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from offsite.config import Pruner
from offsite.model_owner.compress.smallest_weights import Array, without_smallest

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class StoredPruner(Protocol):
    """Protocol of pruners without calibration data, which run when weights are stored; each is a Python file here."""

    def prune_stored(self, weight: Array, share: float) -> Array:
        """Set a fraction `share` of a matrix's weights to zero; `weight` has the layout of checkpoint files."""


@runtime_checkable
class CalibratedPruner(Protocol):
    """Protocol of pruners that need statistics of each linear layer's inputs; each is a Python file of this folder."""

    def sum_inputs(self, inputs: "Tensor") -> "Tensor":
        """The statistics that the pruner needs of a layer's inputs (N, I), such as their Gram matrix.

        They are a sum over the N tokens, so the caller adds those of several batches.
        """

    def from_gram(self, gram: "Tensor") -> "Tensor":
        """The statistics that `sum_inputs` returns, computed from the Gram matrix (I, I) of the inputs."""

    def prune_matrices(self, weights: Mapping[str, "Tensor"], sums: "Tensor", share: float) -> Mapping[str, "Tensor"]:
        """Prune the matrices (outputs, I) of linear layers that have the same inputs.

        Args:
            weights: the matrices, keyed by the layers' paths.
            sums: the statistics from `sum_inputs` or `from_gram`.
            share: fraction of each matrix that becomes zero.

        Returns:
            The new matrices in float32, keyed by the same paths.
        """


@dataclass(frozen=True)
class Pruning:
    """A calibrated pruner with its row of the pruner table, and the fraction of each matrix that it sets to zero."""

    row: Pruner
    pruner: CalibratedPruner
    share: float  # fraction of each matrix that becomes zero

    def prune(self, weight: "Tensor", gram: "Tensor") -> "Tensor":
        """Prune one matrix (outputs, I), given the Gram matrix (I, I) of the layer's inputs."""
        return self.prune_matrices({"": weight}, self.pruner.from_gram(gram))[""]

    def prune_matrices(self, weights: Mapping[str, "Tensor"], sums: "Tensor | None") -> Mapping[str, "Tensor"]:
        """Prune matrices (outputs, I) of linear layers that have the same inputs.

        If no calibration token reached the layers, such as those of an unused expert, the smallest weights become zero.

        Args:
            weights: the matrices, keyed by the layers' paths.
            sums: the statistics of the inputs, as the pruner sums them; None if the inputs are unknown.
        """
        if sums is not None and bool(sums.any()):
            return self.pruner.prune_matrices(weights, sums, self.share)
        axis = 1 if self.row.by_output else None
        return {path: _without_smallest(weight, self.share, axis) for path, weight in weights.items()}


def _without_smallest(weight: "Tensor", share: float, axis: int | None) -> "Tensor":
    """Magnitude pruning of a torch tensor; arguments as for `without_smallest`, with `axis` for `inputs_axis`."""
    pruned = without_smallest(weight.detach().float().cpu().numpy(), share, axis)
    return weight.new_tensor(pruned).float()


def pruning(row: Pruner, share: float) -> Pruning:
    """Import the Python file of a calibrated pruner, which imports torch; `share` is the fraction of zeros."""
    return Pruning(row, cast(CalibratedPruner, import_module(row.module)), share)


def prune_stored(row: Pruner, weight: Array, share: float, inputs_axis: int) -> Array:
    """Prune a matrix when the bundle's weights are written.

    A calibrated pruner has run earlier, and its zeros stay zero. If they are too few, because MLP neurons were removed
    since, the smallest other weights become zero too.

    Args:
        row: the pruner's row of the table of pruners.
        weight: the matrix, in the layout of its file.
        share: fraction of the weights that become zero.
        inputs_axis: the axis of the matrix that runs over the layer's inputs.
    """
    if row.calibrated:
        return without_smallest(weight, share, inputs_axis if row.by_output else None)
    return cast(StoredPruner, import_module(row.module)).prune_stored(weight, share)
