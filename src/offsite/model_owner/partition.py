"""Splitting: which base blocks a bundle holds, under which names, and with which config. Tensors move by name."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offsite.config import Method, PackSpec, RefitMap
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.declare import block_tensors, declared_of, require_declarable
from offsite.model_owner.compress.magnitude import pruned
from offsite.model_owner.select.contiguous import contiguous
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT
from offsite.protocol.manifest import Split, TensorEntry
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied

DTYPES = {"bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class Sandwich:
    """A base cut by block index: bottom and top train, and `spread` between them; the others become the emulator."""

    bottom: tuple[int, ...]
    middle: tuple[int, ...]
    top: tuple[int, ...]
    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, trained: Collection[int], blocks: int) -> "Sandwich":
        """Of so many blocks, of which these train and at least one does not."""
        middle = [index for index in range(blocks) if index not in trained]
        first, last = middle[0], middle[-1]
        spread = sorted(index for index in trained if first < index < last)
        return cls(tuple(range(first)), tuple(middle), tuple(range(last + 1, blocks)), tuple(spread))

    def kept(self, emulator: Sequence[int]) -> tuple[int, ...]:
        """All blocks of the bundle, where the emulator has these; one may stand in several places."""
        return (*self.bottom, *sorted((*emulator, *self.spread)), *self.top)


@dataclass(frozen=True)
class Work:
    """What is computed for the emulator's weights before they are stored. Where nothing is lost, nothing is healed."""

    solves: tuple[RefitMap, ...]  # the maps that end attention or MLP and are solved anew, in this order
    prunes: float  # share of every matrix that SparseGPT takes away
    distills: bool
    maps: bool  # a map of the hidden state is solved for behind each kept block

    @property
    def block_by_block(self) -> bool:
        """Whether each block is changed in its turn, on what the blocks before it give."""
        return bool(self.solves) or self.maps or self.prunes > 0

    @property
    def refits(self) -> tuple[RefitMap, ...]:
        """The maps that refit goes through; one that ends the MLP and is only pruned comes last."""
        return self.solves if "mlp" in self.solves or not self.prunes else (*self.solves, "mlp")


def work_of(middle: Sequence[int], spec: PackSpec) -> Work:
    """What the settings ask for with a middle of these blocks."""
    prunes = spec.pruned if spec.prune_by == "sparsegpt" else 0.0
    dropped = spec.kept(middle) < len(middle)
    lost = dropped or prunes > 0
    return Work(
        solves=spec.refit_maps if "refit" in spec.heal and lost else (),
        prunes=prunes,
        distills="distill" in spec.heal and lost,
        maps="affine" in spec.heal and dropped,
    )


def split(model: BaseModel, spec: PackSpec) -> Sandwich:
    """Cut a base in bottom, middle and top.

    Raises:
        UsageError: bottom, keep and top, or train and keep, do not fit into the blocks that there are.
        UsageError: the head is permitted, and the model has none of its own.
        IncompatibleError: the gap is to be healed in a way that the family does not permit.
    """
    trained = spec.trained(model.blocks)
    _require_room(model.blocks, trained, spec)
    sandwich = Sandwich.of(trained, model.blocks)
    middle = sandwich.middle
    work = work_of(middle, spec)
    _require_gap(middle, spec, work)
    if "mlp" in work.solves and not model.row.residual_is_linear(model.config):
        why = "its MLP is a mixture of experts" if model.row.experts else "a norm follows the MLP in its blocks"
        other = "" if model.row.experts or model.row.vision else "; or, with --keep, --heal affine"
        other += '; or with refit_maps = "attention" in a --config file' if model.row.experts else ""
        raise IncompatibleError(
            f"refit needs a residual that is linear in the MLP's output, which this {model.row.model_type} model "
            "does not have",
            reasons=[why],
            next_step=f"pack with --heal none or --heal distill{other}{_without_sparsegpt(model, work)}",
        )
    if "attention" in work.solves and not model.row.residual_is_linear(model.config, "attention"):
        solvable = model.row.residual_is_linear(model.config)
        raise IncompatibleError(
            f"refit_maps names attention, in whose output this {model.row.model_type} model's residual is not linear",
            reasons=["a norm follows the attention in its blocks"],
            next_step='pack with refit_maps = "mlp"' if solvable else "pack with --heal none or --heal distill",
        )
    if work.prunes and model.row.experts:
        raise IncompatibleError(
            f"SparseGPT cannot prune this {model.row.model_type} model",
            reasons=["which expert a token goes to changes with what is pruned"],
            next_step="pack with --prune-by magnitude and --heal none, or drop blocks with --keep",
        )
    if spec.permit_head and not model.row.head_tensors(model.config):
        raise UsageError(
            "--permit-head has no head to permit",
            reasons=[
                "its head is the input embedding, which trains with no adapter"
                if model.row.head
                else "an image encoder has none: its classifier is the data owner's"
            ],
            next_step="pack without --permit-head",
        )
    if sandwich.spread:
        _require_for_spread(spec)
    if model.row.vision is not None:
        _require_for_images(spec)
    if spec.select == "contiguous":
        contiguous(middle, spec.kept(middle), spec.drop_from)  # refuses a piece that does not lie in the middle
    require_declarable(model, spec)
    return sandwich


def _require_room(blocks: int, trained: Collection[int], spec: PackSpec) -> None:
    """Refuse a middle that is not there, or too small for what stays of it.

    Raises:
        UsageError: it is.
    """
    beyond = sorted(index for index in trained if index >= blocks)
    if beyond:
        raise UsageError(
            f"train names blocks that the base does not have: {', '.join(map(str, beyond))[:200]}",
            reasons=[f"it has {blocks}, numbered from 0"],
            next_step=f"choose among 0 to {blocks - 1}",
        )
    middle = [index for index in range(blocks) if index not in trained]
    if not 1 <= spec.kept(middle) <= len(middle):
        raise UsageError(
            f"cannot keep {spec.kept(middle) or 'any'} blocks of a middle of {len(middle)}",
            reasons=[f"the base has {blocks} blocks, of which {len(trained)} train"],
            next_step=f"choose --keep between 1 and {len(middle)}"
            if middle
            else "choose a smaller --bottom or --top, or a shorter --train",
        )


def _without_sparsegpt(model: BaseModel, work: Work) -> str:
    """What else is needed where SparseGPT is to prune a mixture of experts."""
    return (
        "; and drop blocks with --keep, or take --heal none with --prune-by magnitude"
        if work.prunes and model.row.experts
        else ""
    )


def _require_gap(middle: Sequence[int], spec: PackSpec, work: Work) -> None:
    """Refuse steps of healing that were asked for and would do nothing.

    Raises:
        UsageError: there are some.
    """
    does = {"share": spec.kept(middle) < len(middle), "refit": bool(work.solves)}
    does |= {"distill": work.distills, "affine": work.maps}
    idle = [step for step in spec.heal if not does[step]]
    if idle and "heal" in spec.model_fields_set:
        raise UsageError(
            f"--heal {','.join(idle)} would do nothing",
            reasons=["no block is dropped, and no matrix pruned by SparseGPT; other losses are not healed"],
            next_step="say with --keep how many blocks stay, or pack with --heal none",
        )


def _require_for_spread(spec: PackSpec) -> None:
    """Refuse what takes the emulator for one run of frozen blocks, before any work.

    Raises:
        UsageError: it was asked for.
    """
    reasons = [f"select = {spec.select}"] if spec.select in ("search", "cluster", "contiguous") else []
    reasons += [f"heal = {step}" for step in spec.heal if step != "refit"]
    reasons += [f"{name}: a declared module kind" for name in spec.declares if name not in spec.heal]
    if reasons:
        raise UsageError(
            "settings that go with no trained blocks between frozen ones",
            reasons=reasons,
            next_step="select by uniform, influence or random, heal by refit or none, prune with zeros stored; "
            "or let train list first and last blocks alone",
        )


def _require_for_images(spec: PackSpec) -> None:
    """Refuse what is made for language models alone, before any work.

    Raises:
        UsageError: it was asked for.
    """
    reasons = [f"select = {spec.select}"] if spec.select in ("search", "cluster") else []
    reasons += [f"heal = {step}" for step in spec.heal if step not in ("refit", "distill")]
    reasons += ["distill_ce: the next token's cross-entropy"] if spec.distill_ce else []
    reasons += [f"{name}: a declared module kind" for name in spec.declares if name not in spec.heal]
    if set(spec.methods) == {"bottleneck"}:
        reasons.append("methods = bottleneck")
    if reasons:
        raise UsageError(
            "settings that are for language models alone, of an image encoder",
            reasons=reasons,
            next_step="select by uniform, influence, contiguous or random, and heal by refit, distill or none",
        )


def bundle_tensors(
    model: BaseModel,
    kept: Sequence[int],
    healed: Mapping[str, TensorRange],
    dtype: str,
    numbers: Split,
    spec: PackSpec,
) -> list[NewTensor]:
    """Every tensor of the bundle, blocks renumbered from 0, in the order of the base's computation.

    Args:
        model: the base.
        kept: base indices of all blocks that the bundle holds, in order.
        healed: tensors that take the place of the base's, and those of maps behind blocks, by base name.
        dtype: "BF16" or "F32".
        numbers: of blocks in bottom, emulator and top.
        spec: how the emulator's blocks are stored.
    """
    row = model.row
    tensors = [
        copied(model.tensors[name], name=name, dtype=dtype)
        for name in (*row.embeddings, *row.final, row.head)
        if name in model.tensors
    ]
    slots = kept[numbers.bottom : numbers.bottom + numbers.emulator]
    declared = declared_of(model, numbers.bottom, slots, spec)
    for index, base_index in enumerate(kept):
        block = model.block(base_index)
        held = {path: healed.get(row.in_block(base_index, path), tensor) for path, tensor in block.items()}
        place = index - numbers.bottom
        if index in numbers.trained:
            stored = [copied(tensor, name=path, dtype=dtype) for path, tensor in held.items()]
        elif declared is None:
            stored = [
                pruned(tensor, name=path, dtype=dtype, ratio=spec.pruned)
                if spec.pruned and row.is_linear(row.in_block(base_index, path))
                else copied(tensor, name=path, dtype=dtype)
                for path, tensor in held.items()
            ]
        else:
            behind = {path: row.in_block(base_index, path) for path in (AFFINE_WEIGHT, AFFINE_BIAS)}
            held |= {path: healed[name] for path, name in behind.items() if name in healed}
            stored = block_tensors(row, held, declared, spec, dtype) if declared.holds_weights(place) else []
        tensors += [replace(tensor, name=row.in_block(index, tensor.name)) for tensor in stored]
    return tensors


def bundle_config(model: BaseModel, kept: Sequence[int], dtype: str) -> dict[str, Any]:
    """The config of the bundle: allow-listed keys, the new block count in every spelling, per-block lists cut."""
    row = model.row
    config = subset_config(model, kept)
    config = {key: value for key, value in config.items() if key in row.config_keys}
    config.pop("torch_dtype", None)
    return config | {
        "architectures": [row.class_name],
        "model_type": row.model_type,
        **({"tie_word_embeddings": row.tied(model.config)} if row.head else {}),
        "dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
    }


def subset_config(model: BaseModel, kept: Sequence[int]) -> dict[str, Any]:
    """The base's config for the blocks of `kept` alone, in that order."""
    return model.row.subset(model.config, kept)


def counts(sandwich: Sandwich, kept: Sequence[int]) -> Split:
    """The split as the manifest has it: numbers of blocks and places in the bundle, and nothing about the base's.

    Args:
        sandwich: how the base is cut.
        kept: base indices of all blocks that the bundle holds, in order.
    """
    frozen = [place for place, index in enumerate(kept) if index in sandwich.middle]
    first, last = frozen[0], frozen[-1]
    inside = [place for place in range(first, last) if kept[place] in sandwich.spread]
    return Split(bottom=first, emulator=last + 1 - first, top=len(kept) - last - 1, spread=tuple(inside))


def returnable(model: BaseModel, kept: Sequence[int], numbers: Split, dtype: str) -> dict[str, TensorEntry]:
    """The tensors that may come back, by their names in the bundle: all of the trained blocks."""
    return {
        model.row.in_block(index, path): TensorEntry.model_validate({"shape": tensor.shape, "dtype": dtype})
        for index in numbers.trained
        for path, tensor in model.block(kept[index]).items()
    }


def returnable_head(model: BaseModel, spec: PackSpec) -> dict[str, TensorEntry]:
    """The head's tensors that may come back, by name; none where the owner does not permit it."""
    names = model.row.head_tensors(model.config) if spec.permit_head else ()
    return {
        name: TensorEntry.model_validate({"shape": model.tensors[name].shape, "dtype": DTYPES[spec.dtype]})
        for name in names
    }


def permitted_methods(model: BaseModel, spec: PackSpec) -> tuple[Method, ...]:
    """The methods that the owner permits and that can train this model: BitFit needs biases, bottlenecks a decoder.

    Raises:
        UsageError: none is left.
    """
    biased = any(model.row.is_bias(model.row.in_block(0, path)) for path in model.block(0))
    without = {"bitfit"} if not biased else set()
    without |= {"bottleneck"} if model.row.vision is not None else set()
    methods = tuple(method for method in spec.methods if method not in without)
    if not methods:
        raise UsageError(
            f"BitFit trains biases, and the blocks of this {model.row.model_type} model have none",
            next_step="permit another method",
        )
    return methods


def lora_targets(model: BaseModel, kept: Sequence[int], numbers: Split) -> dict[str, tuple[int, int]]:
    """The linear maps that LoRA may sit on, by their names in modules of the bundle, with their (inputs, outputs)."""
    targets = {}
    for index in numbers.trained:
        block = model.block(kept[index])
        for path in model.row.lora_linears_of(model.config):
            rows, columns = block[f"{path}.weight"].shape
            targets[model.row.module_of(model.row.in_block(index, path))] = (
                (rows, columns) if model.row.transposed else (columns, rows)
            )
    return targets
