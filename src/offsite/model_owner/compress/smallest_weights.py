"""Sets the smallest weights of a matrix to zero, for magnitude pruning and when pruned matrices are written.

Torch-free.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def without_smallest(weight: Array, share: float, inputs_axis: int | None = None) -> Array:
    """Set the smallest weights of a matrix to zero; a matrix with enough zeros does not change.

    Args:
        weight: the matrix.
        share: fraction of the weights that become zero.
        inputs_axis: compare the weights along this axis only, so each output loses floor(share * inputs) of them; None
            compares all weights, and floor(share * size) become zero.
    """
    return np.where(where_kept(weight, share, inputs_axis), weight, np.float32(0))


def where_kept(weight: Array, share: float, inputs_axis: int | None = None) -> npt.NDArray[np.bool_]:
    """A mask of the weights that are kept, for the same arguments as `without_smallest`.

    Of weights with equal magnitude, the earlier become zero first.
    """
    if inputs_axis is None:
        kept = np.ones(weight.size, np.bool_)
        kept[np.argsort(np.abs(weight.ravel()), kind="stable")[: int(share * weight.size)]] = False
        return kept.reshape(weight.shape)
    ascending = np.argsort(np.abs(weight), axis=inputs_axis, kind="stable")
    count = int(share * weight.shape[inputs_axis])
    kept = np.ones(weight.shape, np.bool_)
    np.put_along_axis(kept, ascending[:, :count] if inputs_axis else ascending[:count], values=False, axis=inputs_axis)
    return kept
