"""Narrower feed-forward parts: the neurons with the largest weights stay (FedPFT, arXiv 2404.11536). Torch-free."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from offsite.models.family import Architecture
from offsite.models.modules.declared import mlp_inputs

Array = npt.NDArray[np.float32]


def neurons(row: Architecture, read: Callable[[str], Array], width: int) -> npt.NDArray[np.intp]:
    """The neurons of a block that stay, in order: those of the largest L2 norm of [rows of W_in; column of W_out].

    Args:
        row: of the family.
        read: a tensor of the block by its path.
        width: how many stay.
    """
    squares = np.square(read(f"{row.mlp_out}.weight"), dtype=np.float64).sum(1 if row.transposed else 0)
    for path in mlp_inputs(row):
        squares = squares + np.square(read(f"{path}.weight"), dtype=np.float64).sum(0 if row.transposed else 1)
    return np.sort(np.argsort(-squares, kind="stable")[:width])


def narrowed(row: Architecture, path: str, values: Array, kept: npt.NDArray[np.intp]) -> Array:
    """One tensor of a block with the kept neurons alone; others than the feed-forward part's are as they were."""
    module, _, kind = path.rpartition(".")
    if module == row.mlp_out and kind == "weight":
        return values[kept] if row.transposed else values[:, kept]
    if module in mlp_inputs(row):
        return values[kept] if kind == "bias" else values[:, kept] if row.transposed else values[kept]
    return values
