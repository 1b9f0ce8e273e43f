"""The content of a bundle: its tensors and their names, its config, and the tensors that a return may contain."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offsite.config import Method, PackSpec
from offsite.errors import UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.declare_emulator import block_tensors
from offsite.model_owner.sandwich import Sandwich
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT, Declared
from offsite.protocol.manifest import Split, TensorEntry
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied

DTYPES = {"bf16": "BF16", "fp32": "F32"}


def bundle_tensors(
    model: BaseModel,
    kept: Sequence[int],
    healed: Mapping[str, TensorRange],
    dtype: str,
    numbers: Split,
    spec: PackSpec,
    declared: Declared | None,
) -> list[NewTensor]:
    """All tensors of a bundle, named as in its files, with blocks renumbered from 0.

    Tensors outside the blocks come first. Values are computed only when they are written.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        healed: tensors that replace the base's, and tensors of affine layers after blocks; keys are tensor names in the
            base.
        dtype: the bundle's dtype of floats, "BF16" or "F32".
        numbers: the manifest's split: how many blocks each part of the bundle has, and which emulator blocks train.
        spec: the settings of pruning and of the other compressions.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
    """
    family = model.family
    tensors = [
        copied(model.tensors[name], name=name, dtype=dtype)
        for name in (*family.embeddings, *family.final, family.head)
        if name in model.tensors
    ]
    for index, base_index in enumerate(kept):
        block = model.block(base_index)
        held = {path: healed.get(family.in_block(base_index, path), tensor) for path, tensor in block.items()}
        place = index - numbers.bottom
        if index in numbers.verbatim:
            stored = [copied(tensor, name=path, dtype=dtype) for path, tensor in held.items()]
        else:
            behind = {path: family.in_block(base_index, path) for path in (AFFINE_WEIGHT, AFFINE_BIAS)}
            held |= {path: healed[name] for path, name in behind.items() if name in healed}
            holds_weights = declared is None or declared.holds_weights(place)
            stored = block_tensors(model, base_index, held, declared, place, spec, dtype) if holds_weights else []
        tensors += [replace(tensor, name=family.in_block(index, tensor.name)) for tensor in stored]
    return tensors


def bundle_config(model: BaseModel, kept: Sequence[int], dtype: str) -> dict[str, Any]:
    """The bundle's config in the form of its family, without the declaration of blocks that differ from the family's.

    It has only the keys that a bundle may contain, the bundle's number of blocks, and per-block lists for its blocks.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        dtype: the bundle's dtype of floats, "BF16" or "F32".
    """
    family = model.family
    config = subset_config(model, kept)
    config = {key: value for key, value in config.items() if key in family.config_keys}
    config.pop("torch_dtype", None)
    return config | {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **({"tie_word_embeddings": family.tied(model.config)} if family.head else {}),
        "dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
    }


def subset_config(model: BaseModel, kept: Sequence[int]) -> dict[str, Any]:
    """The base's config for a model with only the blocks of these base indices, in that order."""
    return model.family.subset(model.config, kept)


def counts(sandwich: Sandwich, kept: Sequence[int], spec: PackSpec) -> Split:
    """The split for the bundle's manifest: how many of the bundle's blocks are in its bottom, emulator and top.

    It also has the indices, in the bundle, of the blocks between bottom and top that train or may get adapters. If a
    base block runs several times in the emulator, only the one at its original position in the base gets an adapter.

    Args:
        sandwich: the split of the base into bottom, middle and top.
        kept: base indices of the bundle's blocks, in order.
        spec: the settings, which say whether the emulator's blocks get adapters.
    """
    frozen = [place for place, index in enumerate(kept) if index in sandwich.middle]
    first, last = frozen[0], frozen[-1]
    inside = [place for place in range(first, last) if kept[place] in sandwich.spread]
    adapted = [place for place in frozen if _can_have_adapter(place, kept, sandwich)] if spec.adapts_emulator else []
    return Split(
        bottom=first,
        emulator=last + 1 - first,
        top=len(kept) - last - 1,
        spread=tuple(inside),
        adapted=tuple(adapted),
    )


def _can_have_adapter(place: int, kept: Sequence[int], sandwich: Sandwich) -> bool:
    """Whether a block of the emulator can have an adapter.

    It can if its base block runs only once in the bundle, or if it runs here at its original position in the base.

    Args:
        place: the block's index in the bundle.
        kept: base indices of the bundle's blocks, in order.
        sandwich: the split of the base.
    """
    own_place = kept[place] - sandwich.middle[0] + len(sandwich.bottom)
    return kept.count(kept[place]) == 1 or place == own_place


def returnable(
    model: BaseModel, kept: Sequence[int], numbers: Split, dtype: str, declared: Declared | None
) -> dict[str, TensorEntry]:
    """The dtypes and shapes of block tensors that a return may contain as a whole, keyed by name in the bundle.

    They are all tensors of the trained blocks, or only the biases if compressed blocks have adapters.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        numbers: the manifest's split: how many blocks each part of the bundle has, and which emulator blocks train.
        dtype: the bundle's dtype of floats, "BF16" or "F32".
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
    """
    family = model.family
    return {
        family.in_block(index, path): TensorEntry.model_validate({"shape": shape, "dtype": dtype})
        for index in numbers.trained
        for path, shape in _block_shapes(model, kept, numbers, declared, index).items()
        if not numbers.adapted or family.is_bias(family.in_block(index, path))
        if path not in family.layout(kept[index]).buffers
    }


def _block_shapes(
    model: BaseModel, kept: Sequence[int], numbers: Split, declared: Declared | None, index: int
) -> dict[str, tuple[int, ...]]:
    """The tensor shapes of the bundle's block `index`, keyed by path in the block.

    They are the shapes after narrowing, and before matrices are encoded (quantised, low-rank, ...).
    """
    shapes = {path: tensor.shape for path, tensor in model.block(kept[index]).items()}
    if declared is None or index not in numbers.adapted:
        return shapes
    return declared.narrowed(model.family, model.config, shapes, index - numbers.bottom)


def returnable_head(model: BaseModel, spec: PackSpec) -> dict[str, TensorEntry]:
    """The dtypes and shapes of the head's tensors, keyed by name, if the owner permits tuning the head; else empty."""
    names = model.family.head_tensors(model.config) if spec.permits.permit_head else ()
    return {
        name: TensorEntry.model_validate({"shape": model.tensors[name].shape, "dtype": DTYPES[spec.dtype]})
        for name in names
    }


def permitted_methods(model: BaseModel, spec: PackSpec) -> tuple[Method, ...]:
    """The tuning methods that the settings permit and that can train this model.

    BitFit needs blocks with biases. Bottleneck adapters need a language model. Full tuning needs trained blocks that
    are not compressed.

    Raises:
        UsageError: no permitted method can train this model.
    """
    biased = any(model.family.is_bias(model.family.in_block(0, path)) for path in model.block(0))
    without = {"bitfit"} if not biased else set()
    without |= {"bottleneck"} if model.family.vision is not None else set()
    without |= {"full"} if spec.adapts_emulator else set()
    if model.family.layouts:
        without |= {"bottleneck"} if not all(one.outputs for one in model.family.layouts) else set()
        without |= {"lora"} if not all(one.linears for one in model.family.layouts) else set()
    methods = tuple(method for method in spec.permits.methods if method not in without)
    if not methods:
        raise UsageError(
            f"BitFit trains biases, and the blocks of this {model.family.model_type} model have none",
            next_step="permit another method: methods in table [pack] of a --config file",
        )
    return methods


def lora_targets(
    model: BaseModel, kept: Sequence[int], numbers: Split, declared: Declared | None
) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer that LoRA may adapt, keyed by its name in the bundle's torch model.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        numbers: the manifest's split: how many blocks each part of the bundle has, and which emulator blocks train.
        declared: what the bundle's config declares of blocks that differ from the family's; None if none does.
    """
    targets = {}
    for index in numbers.trained:
        shapes = _block_shapes(model, kept, numbers, declared, index)
        for path in model.family.lora_linears_of(model.config, kept[index]):
            rows, columns = shapes[f"{path}.weight"]
            targets[model.family.module_of(model.family.in_block(index, path))] = (
                (rows, columns) if model.family.transposed else (columns, rows)
            )
    return targets
