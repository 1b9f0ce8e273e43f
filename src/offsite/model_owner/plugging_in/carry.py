"""Maps returned values from a narrowed layer of the bundle to the base's layer, with zeros for removed features."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import CarryMap
from offsite.model_owner.ledger import Issued
from offsite.protocol.manifest import BundleManifest

Array = npt.NDArray[np.float32]


def carry_axis(values: Array, kept: tuple[int, ...] | None, size: int, axis: int) -> Array:
    """Insert zeros along one axis of returned values, for the features that the bundle's layer does not have.

    Args:
        values: the returned values; along `axis`, one for each feature of the bundle's layer.
        kept: the indices of these features in the base's layer, ascending; None if no feature was removed.
        size: the number of features of the base's layer.
        axis: the axis of the features.

    Returns:
        An array of length `size` along the axis, with the values at the indices `kept` and zeros elsewhere; `values`
        itself if `kept` is None.
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
    """The arguments of `carry_axis` for one returned tensor, apart from its values."""

    kept: tuple[int, ...] | None
    size: int
    axis: int

    def of(self, values: Array) -> Array:
        """Insert zeros into the tensor's values, see `carry_axis`."""
        return carry_axis(values, self.kept, self.size, self.axis)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `of` returns for values of this shape."""
        return shape if self.kept is None else (*shape[: self.axis], self.size, *shape[self.axis + 1 :])


def layer_shape(model: BaseModel, block: int, path: str) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer of the base.

    Args:
        model: the opened base.
        block: the block's index in the base.
        path: the layer's path in the block.
    """
    rows, columns = model.tensors[f"{model.family.in_block(block, path)}.weight"].shape
    return (columns, rows) if model.family.transposed else (rows, columns)


def carry_of(issued: Issued) -> CarryMap:
    """The ledger's map from a bundle's blocks and layers to the base's.

    Earlier versions recorded no map. For their bundles, it has only the base index of each block.

    Raises:
        IncompatibleError: there is no map, and it is needed because compressed blocks have adapters.
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
    """Raise an error unless the ledger's map fits the bundle and the base, for every layer that LoRA may adapt.

    Args:
        carry: the map from the bundle's blocks and layers to the base's.
        model: the opened base.
        manifest: the bundle's manifest.

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
    """An error message for each side of a layer, inputs or outputs, for which the map does not fit manifest and base.

    Args:
        carry: the map.
        model: the opened base.
        block: the block's index in the bundle.
        path: the layer's path in the block.
        listed: (inputs, outputs) of the layer in the bundle's manifest.
    """
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
