"""Carries returned values from a layer of the bundle to the base's larger layer: what was removed gets zeros."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import CarryMap, KeptFeatures
from offsite.model_owner.ledger import Issued
from offsite.protocol.manifest import BundleManifest

Array = npt.NDArray[np.float32]


def carry_axis(values: Array, kept: tuple[int, ...] | None, size: int, axis: int) -> Array:
    """Spread values along one axis to a larger size.

    Args:
        values: the returned values; along `axis`, one for each kept feature.
        kept: the places of these features in the base, ascending; None if the base has the same features.
        size: the number of features in the base.
        axis: the axis to spread.

    Returns:
        The values at the kept places, zeros at all others; `values` itself if `kept` is None.
    """
    if kept is None:
        return values
    shape = list(values.shape)
    shape[axis] = size
    carried = np.zeros(shape, np.float32)
    carried[(slice(None),) * axis + (list(kept),)] = values
    return carried


@dataclass(frozen=True)
class Spread:
    """The spreading of one axis of a returned tensor to the base's size; `kept` and `size` as for `carry_axis`."""

    kept: tuple[int, ...] | None
    size: int
    axis: int

    def of(self, values: Array) -> Array:
        """Spread the values along this axis."""
        return carry_axis(values, self.kept, self.size, self.axis)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the result, from the shape of the returned values."""
        return shape if self.kept is None else (*shape[: self.axis], self.size, *shape[self.axis + 1 :])


def carry_matrix(values: Array, kept: KeptFeatures, shape: tuple[int, int]) -> Array:
    """Spread a change of a matrix (kept outputs, kept inputs) to the base's (outputs, inputs)."""
    return carry_axis(carry_axis(values, kept.outputs, shape[0], 0), kept.inputs, shape[1], 1)


def layer_shape(model: BaseModel, block: int, path: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of the base, by the block's index in the base and the path in the block."""
    rows, columns = model.tensors[f"{model.family.in_block(block, path)}.weight"].shape
    return (columns, rows) if model.family.transposed else (rows, columns)


def carry_of(issued: Issued) -> CarryMap:
    """The map of a bundle; for a bundle that an earlier version recorded, its kept blocks alone.

    Raises:
        IncompatibleError: adapters sit on compressed blocks, and the ledger has no map.
    """
    if issued.carry is not None:
        return issued.carry
    if issued.manifest.split.adapted:
        raise IncompatibleError(
            "the ledger has no map for this bundle",
            reasons=["its adapters sit on compressed blocks, and only the map says where in the base they belong"],
            next_step="restore the ledger of the home that packed the bundle from a backup, or issue another bundle",
        )
    return CarryMap.of(issued.kept)


def require_fitting_map(carry: CarryMap, model: BaseModel, manifest: BundleManifest) -> None:
    """Raise an error unless the map gives the base's shape for every tensor that the manifest lists.

    Raises:
        IncompatibleError: map, manifest and base disagree; every difference is listed.
    """
    problems = []
    if len(carry.blocks) != manifest.split.blocks:
        problems.append(f"the map has {len(carry.blocks)} blocks, the bundle {manifest.split.blocks}")
    else:
        for target, shape in manifest.lora_targets.items():
            place = model.family.linear_layer_of(target)
            if place is not None:
                problems += _layer_problems(carry, model, *place, listed=shape)
    if problems:
        raise IncompatibleError(
            "the ledger's map does not lead from this bundle to this base",
            reasons=problems,
            next_step="restore the ledger of the home that packed the bundle from a backup, or issue another bundle",
        )


def _layer_problems(carry: CarryMap, model: BaseModel, block: int, path: str, listed: tuple[int, int]) -> list[str]:
    """A message for each side (inputs, outputs) of a layer in which the map differs from `listed`, the manifest's."""
    base, kept = carry.blocks[block].base, carry.features(block, path)
    if not 0 <= base < model.blocks:
        return [f"block {block}: the base has no block {base}"]
    outputs, inputs = layer_shape(model, base, path)
    sides = {"inputs": (kept.inputs, inputs, listed[0]), "outputs": (kept.outputs, outputs, listed[1])}
    return [
        f"block {block}, {path}: the map gives {size if features is None else len(features)} of {size} {side}, "
        f"the bundle has {found}"
        for side, (features, size, found) in sides.items()
        if (size if features is None else len(features)) != found or (features and features[-1] >= size)
    ]
