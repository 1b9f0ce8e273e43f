"""Wanda: removes the weights of each output that have the smallest product of magnitude and input norm.

Sun, Liu, Bair and Kolter, arXiv 2306.11695, section 3: the score of a weight is |W_ij| * ||X_j||_2 over all calibration
tokens, compared among the weights of one output. The remaining weights do not change. Wanda needs one value for each
input of a linear layer, and no matrix inverse; SparseGPT needs a matrix and its inverse.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def sum_inputs(inputs: Tensor) -> Tensor:
    """The squared norms of inputs (N, I), summed over the N tokens: (I,)."""
    return inputs.square().sum(0)


def from_gram(gram: Tensor) -> Tensor:
    """The squared norms (I,) of a layer's inputs: the diagonal of their Gram matrix (I, I)."""
    return gram.diagonal()


def prune_matrices(weights: Mapping[str, Tensor], sums: Tensor, share: float) -> Mapping[str, Tensor]:
    """Set the weights of each output with the lowest scores to zero, in layers that have the same inputs.

    Args:
        weights: matrices (outputs, I), keyed by the layers' paths.
        sums: the squared norms of their inputs, (I,).
        share: exactly floor(share * I) weights of each output become zero, of equal scores the earlier.

    Returns:
        The new matrices (outputs, I) in float32, keyed by path.
    """
    return {path: _prune(weight.float(), sums.sqrt(), share) for path, weight in weights.items()}


def _prune(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Set floor(share * I) weights of each output of a matrix (outputs, I) to zero, given its inputs' norms (I,)."""
    scores = weight.abs() * norms  # (outputs, I)
    lowest = torch.argsort(scores, dim=1, stable=True)[:, : int(share * weight.shape[1])]
    return weight.scatter(1, lowest, 0.0)
