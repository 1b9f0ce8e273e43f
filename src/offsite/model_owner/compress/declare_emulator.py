"""Emulators with compressed or added modules: what the bundle's config declares of them, and which tensors it stores.

Healed tensors are compressed in this order: narrower MLPs, pruning, then encoding of each matrix (such as quantised or
low-rank). Each matrix is read, changed and written on its own, so only one is in memory. Torch-free.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from offsite.config import HealingStep, PackSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.pruner_protocol import prune_stored
from offsite.model_owner.compress.smallest_weights import Array
from offsite.model_owner.compress.stored_form_protocol import BlockReshaping, MatrixEncoding, form_of
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.models.block_widths import Widths
from offsite.models.families.family import Architecture
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT, Declared
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied, from_float32, read_float32


def declared_of(
    model: BaseModel, bottom: int, slots: Sequence[int], spec: PackSpec, widths: Sequence[Widths] | None
) -> Declared | None:
    """What the bundle's config declares of emulator blocks that differ from the family's; None if none differs.

    Args:
        model: the opened base.
        bottom: number of blocks before the emulator.
        slots: base indices of the emulator's blocks, in order; an index may occur several times.
        spec: the compression and healing settings.
        widths: the numbers of heads, neurons and experts of the emulator's blocks; None if they are those of the base.

    Raises:
        IncompatibleError: the family's blocks cannot be compressed as the settings ask.
    """
    fields: dict[str, Any] = {}
    for form in spec.stored_forms:
        fields |= form_of(form).declare(model, spec)
    if widths is not None:
        own = [base_widths(model, index) for index in slots]
        if any(one.heads < whole.heads for one, whole in zip(widths, own, strict=True)):
            fields["heads"] = tuple(one.heads for one in widths)
        if any(one.neurons < whole.neurons for one, whole in zip(widths, own, strict=True)):
            fields["neurons"] = tuple(one.neurons for one in widths)
        if any(one.experts < whole.experts for one, whole in zip(widths, own, strict=True)):
            fields["experts"] = tuple(one.experts for one in widths)
    if len(set(slots)) < len(slots):  # for each place, the place of the same block that holds the weights
        # the block's own place where it carries an adapter: see docs/decisions/0030-placement-every.md
        holders = (index - bottom if spec.adapts_emulator else slots.index(index) for index in slots)
        fields["share"] = tuple(holders)
    fields |= {step.name: True for step in spec.healing_steps if step.declared and step.runs != "places"}
    if not fields:
        return None
    held = {path for index in spec.verbatim(model.blocks) for path in model.block(index)}
    shapes = {path: one.shape for index in slots for path, one in model.block(index).items() if path not in held}
    if shapes:
        fields["shapes"] = shapes
    return Declared.model_validate({"first": bottom, "blocks": len(slots), **fields})


def require_declarable(model: BaseModel, spec: PackSpec) -> None:
    """Raise an error if the settings ask for a compression, or an added layer, that the family's blocks cannot have.

    Raises:
        IncompatibleError: the family has other tensors in checkpoint files than in torch modules, has no row in the
            table, or its blocks cannot be compressed as the settings ask.
    """
    family, narrowing = model.family, set(spec.narrowing_settings if model.family.experts else ())
    asked = [name for name in spec.declares if name not in narrowing]
    if asked and (family.experts or family.modules or family.layouts):
        raise IncompatibleError(
            f"this {family.model_type} model's emulator cannot be compressed in this way",
            reasons=[
                f"{', '.join(asked)}: "
                + (
                    "this works with the families of the table"
                    if family.layouts
                    else "blocks of this family have other tensors in files than in modules"
                )
            ],
            next_step=spec.nearest(
                lambda row: not (isinstance(row, HealingStep) and row.declared),
                left_out=[name for name in spec.declaring_settings if name not in narrowing],
            ),
        )
    for form in spec.stored_forms:
        form_of(form).declare(model, spec)


def block_tensors(
    model: BaseModel,
    index: int,
    tensors: Mapping[str, TensorRange],
    declared: Declared | None,
    place: int,
    spec: PackSpec,
    dtype: str,
) -> list[NewTensor]:
    """The tensors that the bundle stores for one block of the emulator, named by their path in the block.

    Args:
        model: the opened base.
        index: the block's index in the base.
        tensors: the block's tensors after healing, keyed by path in the block, and those of the affine layer after it,
            if there is one.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
        place: the block's index in the emulator, from 0.
        spec: the settings of pruning and of the other compressions.
        dtype: the bundle's dtype of floats, "BF16" or "F32".
    """
    family = model.family
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

    plain = {*tensors, AFFINE_WEIGHT, AFFINE_BIAS}  # float tensors, unless a form stores them otherwise
    shapes = {path: tensor.shape for path, tensor in model.block(index).items()}
    expected = declared.tensors(family, model.config, shapes, place)
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
    """A function that reads a tensor of the block, given its path in the block, and returns its values in float32.

    It narrows the MLP's tensors and prunes linear layers, if the settings ask for that.
    """

    def read(path: str) -> Array:
        return read_float32(tensors[path])

    forms = map(form_of, spec.stored_forms)
    shapers = [form.reshape(family, read, declared) for form in forms if declared and isinstance(form, BlockReshaping)]

    def values(path: str) -> Array:
        found = read(path)
        if path in (AFFINE_WEIGHT, AFFINE_BIAS):  # the affine layer is not part of the block
            return found
        for reshape in shapers:
            found = reshape(path, found)
        if spec.pruned and family.is_linear(family.in_block(0, path)):
            found = prune_stored(spec.pruner, found, spec.pruned, inputs_axis=0 if family.transposed else 1)
        return found

    return values
