"""Pruned matrices as they are stored, and magnitude pruning: the smallest numbers become zero. Torch-free.

It comes last, after healing, so that what is shipped has the share of zeros that was asked for. What SparseGPT pruned
before has its zeros already, and they are the smallest numbers.
"""

import numpy as np
import numpy.typing as npt

from offsite.storage.safetensors_files import NewTensor, TensorRange, from_float32, read_float32

Array = npt.NDArray[np.float32]


def pruned(tensor: TensorRange, *, name: str, dtype: str, ratio: float) -> NewTensor:
    """A matrix as one to be written, under a new name, without the `ratio` of its numbers that are smallest."""
    return NewTensor(
        name, dtype, tensor.shape, lambda: [from_float32(sparse(read_float32(tensor), ratio), dtype).tobytes()]
    )


def sparse(values: Array, ratio: float) -> Array:
    """A matrix without its smallest numbers: exactly floor(ratio * size) of them become zero, of equals the earlier."""
    return np.where(stays(values, ratio), values, np.float32(0))


def stays(values: Array, ratio: float) -> npt.NDArray[np.bool_]:
    """Where a matrix keeps its numbers, when floor(ratio * size) of them go: the smallest, of equals the earlier."""
    kept = np.ones(values.size, np.bool_)
    kept[np.argsort(np.abs(values.ravel()), kind="stable")[: int(ratio * values.size)]] = False
    return kept.reshape(values.shape)


def packed(values: Array, ratio: float) -> tuple[npt.NDArray[np.uint8], Array]:
    """A pruned matrix (outputs, inputs) as a mask of bits and the numbers that stay.

    Returns:
        Mask: uint8 (outputs, inputs / 8 rounded up), the first input in the lowest bit. Numbers: float32 (count,), row
        after row.
    """
    kept = stays(values, ratio)
    return np.packbits(kept, axis=1, bitorder="little"), values[kept]
