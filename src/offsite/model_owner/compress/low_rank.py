"""Truncated SVD: the closest matrix of a given rank, as a product of two thin ones (Eckart and Young). Torch-free."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.models.modules.declared import Declared

Array = npt.NDArray[np.float32]


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The rank, as a fraction of the full rank, in the field of `Declared` for it."""
    return {"svd_rank": spec.compress.svd_rank}


def encode(weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
    """The factors of a matrix (outputs, inputs) for the declared rank: "down" (rank, inputs), "up" (outputs, rank)."""
    outputs, inputs = weight.shape
    down, up = factorise(weight, declared.rank(inputs, outputs))
    return {"down": down, "up": up}


def factorise(weight: Array, rank: int) -> tuple[Array, Array]:
    """Factorise a matrix (outputs, inputs) into down (rank, inputs) and up (outputs, rank).

    up @ down is the closest matrix of this rank in the Frobenius norm.
    """
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    roots = np.sqrt(values[:rank])  # each factor gets the root, so that both round equally in bf16
    return (roots[:, None] * right[:rank]).astype(np.float32), (left[:, :rank] * roots).astype(np.float32)
