"""Pruned matrices stored as a mask and the weights that stay: zeros cost a bit each. Torch-free."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.zeros import Array, where_kept
from offsite.models.modules.declared import Declared


def declare(model: BaseModel, spec: PackSpec) -> Mapping[str, Any]:
    """The share of every matrix that is not stored."""
    return {"sparse": spec.pruned}


def encode(weight: Array, declared: Declared) -> Mapping[str, npt.NDArray[Any]]:
    """A pruned matrix (outputs, inputs) as `mask` and `values`."""
    mask, values = pack_sparse(weight, declared.sparse or 0.0)
    return {"mask": mask, "values": values}


def pack_sparse(weight: Array, share: float) -> tuple[npt.NDArray[np.uint8], Array]:
    """A pruned matrix (outputs, inputs) as a mask of bits and the weights that stay.

    The file's size follows from the share, so exactly floor(share * size) weights are left out: zeros, and where they
    are fewer (a pruner that compares by output rounds down for each) the smallest of the others.

    Returns:
        Mask: uint8 (outputs, inputs / 8 rounded up), the first input in the lowest bit. Weights: float32 (count,),
        output after output.
    """
    kept = where_kept(weight, share)
    return np.packbits(kept, axis=1, bitorder="little"), weight[kept]
