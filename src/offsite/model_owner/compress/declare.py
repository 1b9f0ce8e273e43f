"""An emulator with modules of our own: what its config declares, and the tensors that are stored for a block.

Applied to what healing gave, in this order: feed-forward width, pruning, then factors, low bits or a mask. A matrix is
read, changed and written when its turn comes. Torch-free.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from offsite.config import PackSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.low_rank import factors
from offsite.model_owner.compress.magnitude import packed, sparse
from offsite.model_owner.compress.mlp_width import narrowed, neurons
from offsite.model_owner.compress.quantise import quantised
from offsite.model_owner.heal.share import owners
from offsite.models.family import Architecture
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT, Declared, mlp_inputs
from offsite.storage.safetensors_files import NewTensor, TensorRange, from_float32, read_float32

Array = npt.NDArray[np.float32]


def declared_of(model: BaseModel, bottom: int, slots: Sequence[int], spec: PackSpec) -> Declared | None:
    """What the bundle's config declares; None where all blocks are the family's own.

    Args:
        model: the base.
        bottom: number of blocks before the emulator.
        slots: base indices of the emulator's blocks, in order; one may stand in several places.
        spec: what was asked for.
    """
    width = _inner(model) if spec.compress.mlp_width is not None else 0
    places = {
        "share": owners(slots) if len(set(slots)) < len(slots) else None,
        "bits": spec.compress.bits,
        "group": spec.compress.group if spec.compress.bits else None,
        "svd_rank": spec.compress.svd_rank,
        "mlp_width": max(1, round(spec.compress.mlp_width * width)) if spec.compress.mlp_width is not None else None,
        "sparse": spec.pruned if spec.compress.zeros == "left-out" else None,
        "affine": True if "affine" in spec.heal.steps else None,
    }
    if all(kind is None for kind in places.values()):
        return None
    return Declared.model_validate({"first": bottom, "blocks": len(slots), **places})


def require_declarable(model: BaseModel, spec: PackSpec) -> None:
    """Refuse module kinds that a family's blocks cannot have, before any work.

    Raises:
        IncompatibleError: the blocks cannot be taken apart as the kinds need it.
    """
    row, reasons = model.row, []
    asked = spec.declares
    if asked and (row.experts or row.modules):
        reasons.append(f"{', '.join(asked)}: blocks of this family have other tensors in files than in modules")
    elif spec.compress.mlp_width is not None:
        inner, shapes = _inner(model), {path: tensor.shape for path, tensor in model.block(0).items()}
        outputs = {shapes[f"{path}.weight"][1 if row.transposed else 0] for path in mlp_inputs(row)}
        if outputs != {inner}:
            reasons.append("mlp_width: one linear map makes several outputs for each neuron of the feed-forward part")
    if reasons:
        raise IncompatibleError(
            f"this {row.model_type} model's emulator cannot be compressed in this way",
            reasons=reasons,
            next_step="leave these settings out; dropping, distilling and pruning by magnitude work with every family",
        )


def block_tensors(
    row: Architecture, tensors: Mapping[str, TensorRange], declared: Declared, spec: PackSpec, dtype: str
) -> list[NewTensor]:
    """What is stored for one block of the emulator, by path in the block.

    Args:
        row: of the family.
        tensors: the block's, as healed, by path; with those of the map behind it, if there is one.
        declared: what the block is.
        spec: for the share that is pruned.
        dtype: of the floats.
    """

    @functools.cache
    def stay() -> npt.NDArray[np.intp]:
        return neurons(row, lambda path: read_float32(tensors[path]), declared.mlp_width or 0)

    def values(path: str) -> Array:
        found = read_float32(tensors[path])
        if path in (AFFINE_WEIGHT, AFFINE_BIAS):  # not the block's own
            return found
        if declared.mlp_width is not None:
            found = narrowed(row, path, found, stay())
        return sparse(found, spec.pruned) if spec.pruned and row.is_linear(row.in_block(0, path)) else found

    def matrix(path: str) -> Array:  # (outputs, inputs)
        found = values(f"{path}.weight")
        return np.ascontiguousarray(found.T) if row.transposed else found

    def bytes_of(path: str, kind: str) -> list[bytes]:
        if kind in ("quantised", "scales"):
            codes, scales = quantised(matrix(path), declared.bits or 8, declared.group or 64)
            return [codes.tobytes() if kind == "quantised" else from_float32(scales, dtype).tobytes()]
        if kind in ("down", "up"):
            weight = matrix(path)
            down, up = factors(weight, declared.rank(weight.shape[1], weight.shape[0]))
            return [from_float32(down if kind == "down" else up, dtype).tobytes()]
        if kind in ("mask", "values"):
            mask, kept = packed(matrix(path), spec.pruned)
            return [mask.tobytes() if kind == "mask" else from_float32(kept, dtype).tobytes()]
        return [from_float32(values(f"{path}.{kind}"), dtype).tobytes()]

    expected = declared.tensors(row, {path: tensor.shape for path, tensor in tensors.items()})
    return [
        NewTensor(path, dtype if dtype in dtypes else dtypes[0], shape, functools.partial(bytes_of, *_parts(path)))
        for path, (shape, dtypes) in expected.items()
    ]


def _parts(path: str) -> tuple[str, str]:
    module, _, kind = path.rpartition(".")
    return module, kind


def _inner(model: BaseModel) -> int:
    rows, columns = model.block(0)[f"{model.row.mlp_out}.weight"].shape
    return rows if model.row.transposed else columns
