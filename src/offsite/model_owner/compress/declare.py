"""An emulator with modules of our own: what its config declares, and the tensors that are stored for a block.

Applied to what healing gave, in this order: a smaller shape, pruning, then another form of each matrix. A matrix is
read, changed and written when its turn comes. Torch-free.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from offsite.config import PackSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.pruner import prune_stored
from offsite.model_owner.compress.stored_form import BlockReshaping, MatrixEncoding, form_of
from offsite.model_owner.compress.zeros import Array
from offsite.models.family import Architecture
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT, Declared
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied, from_float32, read_float32


def declared_of(model: BaseModel, bottom: int, slots: Sequence[int], spec: PackSpec) -> Declared | None:
    """What the bundle's config declares; None where all blocks are the family's own.

    Args:
        model: the base.
        bottom: number of blocks before the emulator.
        slots: base indices of the emulator's blocks, in order; one may stand in several places.
        spec: what was asked for.

    Raises:
        IncompatibleError: the family's blocks cannot be stored in a form that was asked for.
    """
    fields: dict[str, Any] = {}
    for form in spec.stored_forms:
        fields |= form_of(form).declare(model, spec)
    if len(set(slots)) < len(slots):  # for each place the first with the same block, where its weights are stored
        fields["share"] = tuple(slots.index(index) for index in slots)
    fields |= {step.name: True for step in spec.healing_steps if step.declared and step.runs != "places"}
    return Declared.model_validate({"first": bottom, "blocks": len(slots), **fields}) if fields else None


def require_declarable(model: BaseModel, spec: PackSpec) -> None:
    """Refuse module kinds that a family's blocks cannot have, before any work.

    Raises:
        IncompatibleError: the blocks cannot be taken apart as the kinds need it.
    """
    family, asked = model.family, spec.declares
    if asked and (family.experts or family.modules):
        raise IncompatibleError(
            f"this {family.model_type} model's emulator cannot be compressed in this way",
            reasons=[f"{', '.join(asked)}: blocks of this family have other tensors in files than in modules"],
            next_step="leave these settings out; dropping, distilling and pruning by magnitude work with every family",
        )
    for form in spec.stored_forms:
        form_of(form).declare(model, spec)


def block_tensors(
    family: Architecture, tensors: Mapping[str, TensorRange], declared: Declared | None, spec: PackSpec, dtype: str
) -> list[NewTensor]:
    """What is stored for one block of the emulator, by path in the block.

    Args:
        family: of the model.
        tensors: the block's, as healed, by path; with those of the map behind it, if there is one.
        declared: what the block is; None where it is the family's own.
        spec: how it is pruned and stored.
        dtype: of the floats.
    """
    values = _values(family, tensors, declared, spec)

    def floats(path: str) -> list[bytes]:
        return [from_float32(values(path), dtype).tobytes()]

    if declared is None:
        return [
            NewTensor(path, dtype, tensor.shape, functools.partial(floats, path))
            if spec.pruned and family.is_linear(family.in_block(0, path))
            else copied(tensor, name=path, dtype=dtype)
            for path, tensor in tensors.items()
        ]
    encodings = [form for form in map(form_of, spec.stored_forms) if isinstance(form, MatrixEncoding)]  # one at most

    def encoded(path: str) -> list[bytes]:
        module, _, kind = path.rpartition(".")
        weight = values(f"{module}.weight")
        matrix = np.ascontiguousarray(weight.T) if family.transposed else weight  # (outputs, inputs)
        found = encodings[0].encode(matrix, declared)[kind]
        return [(from_float32(found, dtype) if found.dtype == np.float32 else found).tobytes()]

    plain = {*tensors, AFFINE_WEIGHT, AFFINE_BIAS}  # what stays a tensor of floats where no form stores it otherwise
    expected = declared.tensors(family, {path: tensor.shape for path, tensor in tensors.items()})
    return [
        NewTensor(
            path,
            dtype if dtype in dtypes else dtypes[0],
            shape,
            functools.partial(floats if path in plain else encoded, path),
        )
        for path, (shape, dtypes) in expected.items()
    ]


def _values(
    family: Architecture, tensors: Mapping[str, TensorRange], declared: Declared | None, spec: PackSpec
) -> Callable[[str], Array]:
    """A function that reads a tensor of a block by its path, with the block's smaller shape, and pruned."""

    def read(path: str) -> Array:
        return read_float32(tensors[path])

    forms = map(form_of, spec.stored_forms)
    shapers = [form.reshape(family, read, declared) for form in forms if declared and isinstance(form, BlockReshaping)]

    def values(path: str) -> Array:
        found = read(path)
        if path in (AFFINE_WEIGHT, AFFINE_BIAS):  # not the block's own
            return found
        for reshape in shapers:
            found = reshape(path, found)
        if spec.pruned and family.is_linear(family.in_block(0, path)):
            found = prune_stored(spec.pruner, found, spec.pruned, inputs_axis=0 if family.transposed else 1)
        return found

    return values
