"""Magnitude pruning: the smallest numbers of every matrix of the emulator become zero. Torch-free.

It comes last, after healing, so that what is shipped has the share of zeros that was asked for.
"""

import numpy as np
import numpy.typing as npt

from offsite.core.checkpoint import NewTensor, TensorRange, from_float32, read_float32


def pruned(tensor: TensorRange, *, name: str, dtype: str, ratio: float) -> NewTensor:
    """A matrix as one to be written, under a new name, without the `ratio` of its numbers that are smallest."""
    return NewTensor(
        name, dtype, tensor.shape, lambda: [from_float32(sparse(read_float32(tensor), ratio), dtype).tobytes()]
    )


def sparse(values: npt.NDArray[np.float32], ratio: float) -> npt.NDArray[np.float32]:
    """A matrix without its smallest numbers: exactly floor(ratio * size) of them become zero, of equals the earlier."""
    count = int(ratio * values.size)
    flat = values.ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
    return flat.reshape(values.shape)
