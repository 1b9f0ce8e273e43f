"""Counts how many of the base's parameters a new bundle holds verbatim, compressed, or not at all. Torch-free.

Tensors that healing, pruning or narrowing changed are compared with the base's value by value, since a part of their
values may be the base's own.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.base_shares import BaseShares
from offsite.model_owner.carry_map import ALL, KeptFeatures
from offsite.model_owner.compress.smallest_weights import Array
from offsite.model_owner.compress.sparse_matrices import unpack_sparse
from offsite.model_owner.heal.heal_steps import Healed
from offsite.model_owner.make_carry_map import narrowed_layers
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.models.block_widths import Indices, narrowed_names, tensor_places
from offsite.models.modules.declared import Declared
from offsite.protocol.manifest import Split
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import TensorRange, from_float32, read_chunks, read_float32, to_float32

_BaseIndices = tuple[Indices | None, ...]  # the base's indices on each axis of a tensor that the bundle has; None: all


def count_base_shares(
    model: BaseModel,
    kept: Sequence[int],
    numbers: Split,
    healed: Healed,
    declared: Declared | None,
    spec: PackSpec,
    folder: Path,
) -> BaseShares:
    """Count the base's parameters that a bundle holds verbatim, compressed, or not at all.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        numbers: the manifest's split: how many blocks each part of the bundle has, and which emulator blocks train.
        healed: the tensors that narrowing, healing or pruning changed, and which heads, neurons and experts remain in
            narrowed blocks.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
        spec: the settings of pruning and of stored forms.
        folder: the folder with the bundle's weights.

    Raises:
        StorageError: a file cannot be read.
    """
    written = open_checkpoint(folder).tensors
    outside = [name for name in model.tensors if model.family.block_of(name) is None and name in written]
    verbatim, compressed = sum(math.prod(model.tensors[name].shape) for name in outside), 0
    for index, base_index in enumerate(kept):
        if index in numbers.verbatim:
            verbatim += sum(math.prod(tensor.shape) for tensor in model.block(base_index).values())
        elif declared is None or declared.holds_weights(index - numbers.bottom):
            equal, size = _count_block(model, index, base_index, healed, declared, spec, written)
            verbatim, compressed = verbatim + equal, compressed + size - equal
    total = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    return BaseShares(verbatim, compressed, total - verbatim - compressed)


def _count_block(
    model: BaseModel,
    index: int,
    base_index: int,
    healed: Healed,
    declared: Declared | None,
    spec: PackSpec,
    written: Mapping[str, TensorRange],
) -> tuple[int, int]:
    """Count the base's values that block `index` of the bundle has unchanged, and all that it has or compresses.

    The second count leaves out the values of heads, neurons and experts that were removed from the block.

    Args:
        model: the opened base.
        index: the block's index in the bundle.
        base_index: the block's index in the base.
        healed: as for `count_base_shares`.
        declared: as for `count_base_shares`.
        spec: as for `count_base_shares`.
        written: the tensors in the bundle's weight files, keyed by name.
    """
    family, block = model.family, model.block(base_index)
    same = total = 0
    for path, (source, places) in _base_indices(model, base_index, healed, declared, spec).items():
        tensor, name, name_in_base = block[source], family.in_block(index, path), family.in_block(base_index, path)
        shape = tuple(n if at is None else len(at) for n, at in zip(tensor.shape, places, strict=False))
        total += math.prod(shape)
        changed = name_in_base in healed.tensors or any(at is not None for at in places)
        pruned = bool(spec.pruned) and family.is_linear(name_in_base)
        if name in written and not changed and not pruned:
            same += math.prod(shape)  # it was copied
        elif (stored := _stored(written, name, shape, transposed=family.transposed)) is not None:
            same += int(np.count_nonzero(_rounded(tensor, places, stored.dtype) == stored.values))
    return same, total


def _base_indices(
    model: BaseModel, base_index: int, healed: Healed, declared: Declared | None, spec: PackSpec
) -> dict[str, tuple[str, _BaseIndices]]:
    """For each tensor of a bundle's block, by path: its path in the base's block, and the base's indices that remain.

    The indices are those of the base tensor's rows and columns that the bundle's tensor has, before it is encoded.
    """
    family, block = model.family, model.block(base_index)
    if base_index in healed.kept:
        base, kept = base_widths(model, base_index), healed.kept[base_index]
        return {
            name: (path, tensor_places(family, path, block[path].shape, base, kept))
            for name, path in narrowed_names(family, block, base, kept).items()
        }
    layers = narrowed_layers(model, base_index, healed, declared, spec) if declared else {}
    found = {}
    for path, tensor in block.items():
        layer, _, kind = path.rpartition(".")
        features = layers.get(layer, ALL)
        found[path] = path, _of_layer(features, kind, len(tensor.shape), transposed=family.transposed)
    return found


def _of_layer(features: KeptFeatures, kind: str, axes: int, *, transposed: bool) -> _BaseIndices:
    """The base's indices that remain on each axis of a tensor of a linear layer; None for an axis without removals.

    Args:
        features: the inputs and outputs of the layer that remain.
        kind: the last part of the tensor's name, such as "weight".
        axes: the tensor's number of axes.
        transposed: whether checkpoint files store weights as (inputs, outputs).
    """
    if axes == 1:
        return (features.outputs,)
    if axes != 2 or kind != "weight":
        return (None,) * axes
    return (features.inputs, features.outputs) if transposed else (features.outputs, features.inputs)


class _Stored(NamedTuple):
    values: Array
    dtype: str


def _stored(
    written: Mapping[str, TensorRange], name: str, shape: tuple[int, ...], *, transposed: bool
) -> _Stored | None:
    """The values of a tensor of the bundle, in the layout of the base's files, and their dtype.

    None if the bundle stores the tensor in few bits or in factors.

    Args:
        written: the tensors in the bundle's weight files, keyed by name.
        name: the tensor's name in the bundle.
        shape: its shape in the layout of the base's files.
        transposed: whether these files store weights as (inputs, outputs).
    """
    if name in written:
        return _Stored(read_float32(written[name]), written[name].dtype)
    layer = name.removesuffix(".weight")
    if f"{layer}.mask" not in written:
        return None
    mask, values = written[f"{layer}.mask"], written[f"{layer}.values"]
    bits = np.frombuffer(b"".join(read_chunks(mask)), np.uint8).reshape(mask.shape)
    matrix = unpack_sparse(bits, read_float32(values), inputs=shape[0] if transposed else shape[1])
    return _Stored(matrix.T if transposed else matrix, values.dtype)


def _rounded(tensor: TensorRange, places: _BaseIndices, dtype: str) -> Array:
    """The values of a base tensor at the indices `places` of each axis (None: all), rounded to `dtype`."""
    values = read_float32(tensor)
    for axis, at in enumerate(places):
        if at is not None:
            values = values.take(at, axis)
    return to_float32(from_float32(values, dtype).tobytes(), dtype).reshape(values.shape)
