"""Matrices without their smallest weights: how magnitude prunes, and how every pruned matrix is stored. Torch-free."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def without_smallest(weight: Array, share: float, inputs_axis: int | None = None) -> Array:
    """A matrix with its smallest weights set to zero; one that has enough zeros already stays as it is.

    Args:
        weight: the matrix.
        share: of the weights that go.
        inputs_axis: compare the weights along this axis alone, so each output loses floor(share * inputs) of them; None
            compares all, and floor(share * size) go.
    """
    return np.where(where_kept(weight, share, inputs_axis), weight, np.float32(0))


def where_kept(weight: Array, share: float, inputs_axis: int | None = None) -> npt.NDArray[np.bool_]:
    """Where a matrix keeps its weights, when the smallest go as in `without_smallest`; of equals the earlier go."""
    if inputs_axis is None:
        kept = np.ones(weight.size, np.bool_)
        kept[np.argsort(np.abs(weight.ravel()), kind="stable")[: int(share * weight.size)]] = False
        return kept.reshape(weight.shape)
    ascending = np.argsort(np.abs(weight), axis=inputs_axis, kind="stable")
    count = int(share * weight.shape[inputs_axis])
    kept = np.ones(weight.shape, np.bool_)
    np.put_along_axis(kept, ascending[:, :count] if inputs_axis else ascending[:count], values=False, axis=inputs_axis)
    return kept
