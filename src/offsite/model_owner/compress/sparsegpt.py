"""SparseGPT: weights are removed column by column, and the remaining weights are updated to compensate.

Frantar and Alistarh, arXiv 2301.00774, section 3. Two things differ from the paper. A layer is calibrated on its inputs
in the emulator, not in the base. If the healing step `refit` is on, it fits the output projections of MLP or attention
before they are pruned, so that a block also corrects errors of the blocks before it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = 128  # columns that are pruned before the later columns are updated, as published
_TOGETHER = 16  # columns of these that are updated together first, to stay in the CPU cache
DAMPING = 0.01  # times the mean of the Gram matrix's diagonal, as published


def sum_inputs(inputs: Tensor) -> Tensor:
    """The Gram matrix of inputs (N, I): the sum of x x^T over the N tokens, (I, I)."""
    return inputs.T @ inputs


def from_gram(gram: Tensor) -> Tensor:
    """The Gram matrix (I, I) of a layer's inputs, unchanged, as this pruner's statistics are the Gram matrix itself."""
    return gram


def prune_matrices(weights: Mapping[str, Tensor], sums: Tensor, share: float) -> Mapping[str, Tensor]:
    """Prune the matrices of layers that have the same inputs, and update the remaining weights to compensate.

    Args:
        weights: matrices (outputs, I), keyed by the layers' paths.
        sums: the Gram matrix of their inputs, (I, I).
        share: exactly floor(share * size) weights of each become zero.

    Returns:
        The new matrices (outputs, I) in float32, keyed by path.
    """
    unused, factor = sums.diagonal() == 0, _inverse_factor(sums)
    return {path: _prune(weight, unused, factor, share) for path, weight in weights.items()}


def _prune(weight: Tensor, unused: Tensor, factor: Tensor, share: float) -> Tensor:
    """Prune one matrix (outputs, I): exactly floor(share * size) weights become zero.

    `unused` (I,) marks inputs that are always zero; `factor` (I, I) is the result of `_inverse_factor`.
    """
    outputs, inputs = weight.shape
    left = weight.float().T.clone(memory_format=torch.contiguous_format)  # (inputs, outputs)
    left[unused] = 0  # weights of unused inputs can be removed without error
    gone = 0
    for first in range(0, inputs, COLUMNS):
        last = min(first + COLUMNS, inputs)
        part, own = left[first:last], factor[first:last, first:last]
        count = int(share * outputs * last) - gone
        gone += count
        salience = (part.T / own.diagonal()).square().flatten()  # the squared error if this weight is removed
        removed = _smallest(salience, count).view(outputs, last - first).T.contiguous()
        errors = _errors(part, own, removed)
        part.masked_fill_(removed, 0)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return left.T


def _errors(part: Tensor, own: Tensor, removed: Tensor) -> Tensor:
    """Update the columns of one part of a matrix as its weights are removed, column by column.

    Args:
        part: the columns, (columns, outputs), updated in place.
        own: the rows and columns of the inverse's Cholesky factor for this part, (columns, columns).
        removed: a mask of the removed weights, (columns, outputs).

    Returns:
        The scaled error of each removed weight, (columns, outputs), for the update of the columns after this part.
    """
    errors = torch.zeros_like(part)
    for first in range(0, len(part), _TOGETHER):
        last = min(first + _TOGETHER, len(part))
        for column in range(first, last):
            errors[column] = torch.where(removed[column], part[column], 0.0) / own[column, column]
            part[column + 1 : last].addr_(own[column, column + 1 : last], errors[column], alpha=-1)
        part[last:].addmm_(own[first:last, last:].T, errors[first:last], alpha=-1)
    return errors


def _smallest(values: Tensor, count: int) -> Tensor:
    """A mask (n,) of the `count` smallest of n values; of equal values the earlier."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    largest = values.kthvalue(count).values
    found = values < largest
    equals = (values == largest).nonzero().flatten()
    found[equals[: count - int(found.sum())]] = True
    return found


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Gram matrix's inverse; computed in float64, returned in float32."""
    system = gram.double()
    system.diagonal()[system.diagonal() == 0] = 1
    system.diagonal().add_(DAMPING * system.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
