"""Stores a pruned matrix as a bit mask and the remaining weights, so that a zero takes one bit. Torch-free."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.smallest_weights import Array, where_kept
from offsite.models.modules.declared import Declared


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The fraction of each matrix that is zero and not stored, in the field of `Declared` for it."""
    return {"sparse": spec.pruned}


def encode(weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors that store a pruned matrix (outputs, inputs): the bit "mask" and the remaining "values"."""
    mask, values = pack_sparse(weight, declared.sparse or 0.0)
    return {"mask": mask, "values": values}


def pack_sparse(weight: Array, share: float) -> tuple[npt.NDArray[np.uint8], Array]:
    """Pack a pruned matrix (outputs, inputs) into a bit mask and the remaining weights.

    Exactly floor(share * size) weights are left out, so the file's size is known before. If the matrix has fewer zeros,
    as after a pruner that rounds down for each output, the smallest other weights are left out too.

    Returns:
        Mask: uint8 (outputs, inputs / 8 rounded up), with the first input in the lowest bit. Weights: float32 (count,),
        in row order.
    """
    kept = where_kept(weight, share)
    return np.packbits(kept, axis=1, bitorder="little"), weight[kept]


def unpack_sparse(mask: npt.NDArray[np.uint8], values: Array, inputs: int) -> Array:
    """The matrix (outputs, inputs) that `pack_sparse` packed into this mask and these values."""
    kept = np.unpackbits(mask, axis=1, count=inputs, bitorder="little").astype(np.bool_)
    matrix = np.zeros(kept.shape, np.float32)
    matrix[kept] = values
    return matrix
