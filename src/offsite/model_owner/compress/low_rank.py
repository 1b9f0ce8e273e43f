"""Truncated SVD: a matrix as the product of two thin ones, the nearest of that rank (Eckart and Young). Torch-free."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def factors(weight: Array, rank: int) -> tuple[Array, Array]:
    """A matrix (outputs, inputs) as down (rank, inputs) and up (outputs, rank); up @ down is nearest to it."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    roots = np.sqrt(values[:rank])  # half of the scale to each side, so that neither is coarse in bf16
    return (roots[:, None] * right[:rank]).astype(np.float32), (left[:, :rank] * roots).astype(np.float32)
