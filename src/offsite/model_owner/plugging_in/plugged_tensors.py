"""The tensors of a plug-in, computed from a checkpoint of a verified return and the base. Torch-free (numpy)."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError, VerificationError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.carry_map import ALL, CarryMap, KeptFeatures
from offsite.model_owner.ledger import Issued
from offsite.model_owner.plugging_in.carry import Spread, carry_axis, carry_of, layer_shape
from offsite.protocol.artifacts import Return
from offsite.protocol.contents import WEIGHTS_OF, checkpoint_file
from offsite.protocol.output_head import head_names
from offsite.protocol.peft_adapter import lora_pair
from offsite.storage.finite import has_non_finite
from offsite.storage.safetensors_files import (
    NewTensor,
    StoredTensor,
    TensorRange,
    copied,
    from_float32,
    read_float32,
    to_float32,
)
from offsite.storage.snapshot import HeldTensor

Array = npt.NDArray[np.float32]
# the full change of some rows of a base's tensor, given their values and which rows they are
Change = Callable[[Array, slice], Array]

_PART = 2**20  # values of a tensor that are computed at once
_ANOTHER_RETURN = "ask the data owner for another return; nothing was written"


@dataclass(frozen=True)
class Chosen:
    """A checkpoint of a verified return to plug in, the strength, and the ledger's record of the return's bundle."""

    returned: Return
    parent: Issued
    checkpoint: int  # number of the checkpoint, from 1
    strength: np.float32

    @property
    def tensors(self) -> dict[str, HeldTensor]:
        """The verified tensors of this checkpoint, keyed by their names in the return."""
        manifest = self.returned.manifest
        last = self.checkpoint == manifest.checkpoints
        name = WEIGHTS_OF[manifest.method] if last else checkpoint_file(self.checkpoint)
        return self.returned.files.tensors(name)

    @property
    def head(self) -> dict[str, str]:
        """The name in the base of each returned tensor of the head, by its name in the return; empty if not tuned."""
        manifest = self.returned.manifest
        return head_names(self.parent.manifest, manifest.method) if manifest.head else {}

    @property
    def carry(self) -> CarryMap:
        """The ledger's map from the bundle's blocks and layers to the base's."""
        return carry_of(self.parent)


def adapter_tensors(model: BaseModel, chosen: Chosen) -> list[NewTensor]:
    """The tensors of a plug-in in the form of an adapter for the base, named as in its file.

    The strength multiplies LoRA's B matrices, the up-projections of bottleneck adapters, and the change of the head.
    """
    held, parent, lora = chosen.tensors, chosen.parent, chosen.returned.manifest.lora
    renamed = []
    if lora is None:
        for name, tensor in held.items():
            factor = chosen.strength if ".bottleneck.up." in name else np.float32(1)
            renamed.append(_scaled(tensor, to_base(name, model, parent), factor))
        return renamed
    for target in lora.targets:
        (a, b), (new_a, new_b) = lora_pair(target), lora_pair(to_base(target, model, parent, target=True))
        kept, (outputs, inputs) = _carried_layer(model, chosen, target)
        renamed.append(_scaled(held[a], new_a, np.float32(1), Spread(kept.inputs, inputs, axis=1)))  # (r, inputs)
        renamed.append(_scaled(held[b], new_b, chosen.strength, Spread(kept.outputs, outputs, axis=0)))  # (outputs, r)
    for returned, name in chosen.head.items():
        head = _changed(model.tensors[name], _difference(held[returned], name, parent), chosen.strength, dtype="F32")
        renamed.append(replace(head, name=returned))
    return renamed


def changed_tensors(model: BaseModel, chosen: Chosen) -> dict[str, NewTensor]:
    """The base's tensors that a merged plug-in changes, with their new values, keyed as in `BaseModel.tensors`."""
    changes = {**(_lora_changes if chosen.returned.manifest.lora else _own_changes)(model, chosen)}
    held = chosen.tensors
    changes |= {name: _difference(held[returned], name, chosen.parent) for returned, name in chosen.head.items()}
    return {name: _changed(model.tensors[name], change, chosen.strength) for name, change in changes.items()}


def to_base(name: str, model: BaseModel, parent: Issued, *, target: bool = False) -> str:
    """The name in the base's files of a tensor in a block of the bundle, or of a LoRA target if `target` is set.

    The block's index in the bundle is replaced by its index in the base.

    Args:
        name: the tensor's name in the bundle's files, or the linear layer's name in the torch model.
        model: the opened base.
        parent: the ledger's record of the bundle.
        target: whether `name` is that of a linear layer.

    Raises:
        IncompatibleError: the name is not one in a block.
    """
    block, path = _place_of(name, model, target=target)
    return model.family.in_block(carry_of(parent).blocks[block].base, path)


def _place_of(name: str, model: BaseModel, *, target: bool) -> tuple[int, str]:
    """The block of a tensor or LoRA target of the bundle, and the path in it; raises as `to_base`."""
    place = model.family.linear_layer_of(name) if target else model.family.block_of(name)
    if place is None:
        raise IncompatibleError(f"{name[:200]} belongs to no block", next_step=_ANOTHER_RETURN)
    return place


def _carried_layer(model: BaseModel, chosen: Chosen, target: str) -> tuple[KeptFeatures, tuple[int, int]]:
    """For a LoRA target: the inputs and outputs that the bundle's layer still has, and the base's (outputs, inputs)."""
    block, path = _place_of(target, model, target=True)
    return chosen.carry.features(block, path), layer_shape(model, chosen.carry.blocks[block].base, path)


def _scaled(tensor: StoredTensor, name: str, factor: np.float32, spread: Spread | None = None) -> NewTensor:
    """A returned tensor with the name `name`, multiplied by `factor` in float32, and mapped to the base's shape.

    `spread` says where zeros are inserted for features that the bundle's layer does not have; None inserts none.
    If neither changes the values, the bytes are copied. Writing it raises a VerificationError if a value overflows.
    """
    spread = spread or Spread(None, 0, axis=0)
    if factor == 1 and spread.kept is None:
        return copied(tensor, name=name)

    def chunks() -> list[bytes]:
        with np.errstate(over="ignore"):  # checked below
            values = spread.of(read_float32(tensor) * factor)
        if not np.isfinite(values).all():
            raise VerificationError(
                "the return does not fit into F32 at this strength",
                reasons=[f"{tensor.name} times {factor} would hold infinity"],
                next_step="plug in with a lower --strength; nothing was written",
            )
        return [from_float32(values, "F32").tobytes()]

    return NewTensor(name, "F32", spread.shape(tensor.shape), chunks)


def _changed(tensor: TensorRange, change: Change, strength: np.float32, dtype: str | None = None) -> NewTensor:
    """A base tensor plus `strength` times its change, computed in float32 and rounded once, some rows at a time.

    Writing it raises a VerificationError if a value is not finite.

    Args:
        tensor: the tensor in the base.
        change: the full change of the tensor's rows.
        strength: the factor of the change.
        dtype: the dtype of the result; None means the base's.
    """
    dtype = dtype or tensor.dtype

    def chunks() -> Iterator[bytes]:
        count, step = (tensor.shape or (1,))[0], max(1, _PART // max(1, math.prod(tensor.shape[1:])))
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            values = read_float32(tensor.rows(rows))
            with np.errstate(over="ignore", invalid="ignore"):  # the values to be written are checked below
                delta = strength * change(values, rows)
                # an unchanged value keeps the base's bits, including the sign of a zero
                sums = from_float32(np.where(delta == 0, values, values + delta), dtype).tobytes()
            if has_non_finite(sums, dtype):
                raise VerificationError(
                    f"the return does not fit into {dtype}",
                    reasons=[f"{tensor.name} would hold NaN or infinity, though every returned number is finite"],
                    next_step="plug in with a lower --strength, or ask for another return; nothing was written",
                )
            yield sums

    return NewTensor(tensor.name, dtype, tensor.shape, chunks)


def _lora_changes(model: BaseModel, chosen: Chosen) -> Mapping[str, Change]:
    """The change alpha / rank * B A of each weight that the returned LoRA adapts, keyed by its name in the base."""
    lora, held = chosen.returned.manifest.lora, chosen.tensors
    assert lora is not None  # the manifest of a return by LoRA has its settings

    def change_of(target: str) -> Change:
        def change(_: Array, rows: slice) -> Array:
            a, b = (read_float32(held[name]) for name in lora_pair(target))  # (r, in), (out, r)
            kept, (outputs, inputs) = _carried_layer(model, chosen, target)
            a, b = carry_axis(a, kept.inputs, inputs, 1), carry_axis(b, kept.outputs, outputs, 0)
            scale = np.float32(lora.alpha / lora.rank)
            return scale * (b @ a[:, rows]).T if model.family.transposed else scale * (b[rows] @ a)

        return change

    return {
        f"{to_base(target, model, chosen.parent, target=True)}.weight": change_of(target) for target in lora.targets
    }


def _own_changes(model: BaseModel, chosen: Chosen) -> Mapping[str, Change]:
    """The change of each block tensor that was itself tuned and returned, keyed by the tensor's name in the base."""
    held = {name: tensor for name, tensor in chosen.tensors.items() if name not in chosen.head}
    return {to_base(name, model, chosen.parent): _own_change(held[name], name, model, chosen) for name in held}


def _own_change(returned: HeldTensor, name: str, model: BaseModel, chosen: Chosen) -> Change:
    """The change of a block's tensor that was itself returned: its values minus those that were sent in the bundle.

    The ledger has the sent values for compressed blocks. For other blocks they are the base's, in the bundle's dtype.

    Args:
        returned: the returned tensor.
        name: its name in the return and in the bundle.
        model: the opened base.
        chosen: the checkpoint of the return.
    """
    shipped = chosen.carry.shipped.get(name)
    if shipped is None:
        return _difference(returned, name, chosen.parent)
    dtype, place = chosen.parent.manifest.tensors[name].dtype, model.family.block_of(name)
    kept = chosen.carry.features(place[0], place[1].rpartition(".")[0]) if place else ALL

    size = (model.tensors[to_base(name, model, chosen.parent)].shape or (1,))[0]

    def change(_: Array, rows: slice) -> Array:
        difference = read_float32(returned) - to_float32(shipped, dtype).reshape(returned.shape)
        return carry_axis(np.atleast_1d(difference), kept.outputs, size, 0)[rows]

    return change


def _difference(returned: HeldTensor, name: str, parent: Issued) -> Change:
    """The change of a tensor that was itself returned: its values minus the base's, rounded to the bundle's dtype.

    Args:
        returned: the returned tensor.
        name: its name in the bundle's manifest.
        parent: the ledger's record of the bundle.
    """
    shipped_as = {**parent.manifest.tensors, **parent.manifest.head}[name].dtype

    def change(values: Array, rows: slice) -> Array:
        shipped = to_float32(from_float32(values, shipped_as).tobytes(), shipped_as).reshape(values.shape)
        return read_float32(returned.rows(rows)) - shipped

    return change
