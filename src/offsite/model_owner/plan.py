"""The plan of a packing: its steps, memory, disk space and files, from settings, config and headers of weight files.

Nothing is written. Torch-free.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.config import PackSpec
from offsite.kernels.compute_dtypes import ITEM_BYTES, possible_compute_dtypes
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.bundle_tensors import DTYPES, bundle_tensors, counts
from offsite.model_owner.check_packing import Packing, check_packing, runs_network
from offsite.model_owner.compress.declare_emulator import declared_of
from offsite.model_owner.describe_emulator import describe_emulator, healing_name
from offsite.model_owner.emulator_work import Work, work_of
from offsite.model_owner.heal.heal_steps import fill_places
from offsite.model_owner.heal.healing_protocol import IN_MEMORY
from offsite.model_owner.narrow.budget_widths import base_multiply_adds
from offsite.model_owner.narrow.even_widths import even_widths
from offsite.model_owner.pack import Parties, bundle_manifest
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.models.modules.declared import affine_shapes
from offsite.models.plan_amounts import Amount, Compute, Measurement, Memory, Part, part, total
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.protocol.manifest import MANIFEST, SIGNATURE, FileEntry, render_manifest
from offsite.protocol.signing import SIGNATURE_BYTES
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, WEIGHTS, checkpoint_bytes
from offsite.storage.safetensors_files import ITEM_SIZE, TensorRange

_UNKNOWN = "0" * 64  # has the length of a fingerprint
# bytes that solvers hold for each pair of inputs of a layer: Gram matrices in fp32, their factors in fp64
_SOLVER_BYTES = 36


@dataclass(frozen=True)
class PackPlan:
    """What `pack` would do with some settings: its steps, memory, disk space and files; sizes are in bytes."""

    architecture: str
    emulator: str  # how the emulator is made, in one line
    work: tuple[str, ...]  # steps that run the base's network; empty if tensors are only copied
    base: tuple[Part, ...]
    bundle: tuple[Part, ...]
    files: tuple[Amount, ...]  # files of the bundle, with exact sizes; with a budget of widths, those of even widths
    memory: tuple[Memory, ...]  # weights in memory while the network runs, for each possible compute dtype
    disk: tuple[Amount, ...]
    widths: str | None = None  # with a budget of widths: its total, and when each block's widths are chosen
    measured: Measurement | None = None

    @property
    def disk_bytes(self) -> int:
        """Free space in bytes that packing needs on the disk of the bundle's folder."""
        return total(self.disk)


def plan_pack(
    base: Base, out: Path, recipient: str, spec: PackSpec, home: Home, *, resume: bool = False
) -> tuple[PackPlan, Packing]:
    """Plan a packing without running it.

    Raises the errors that `pack` raises before its long work begins.

    Args:
        base: the owner's full model.
        out: the bundle's folder.
        recipient: the name under which the owner's home stores the data owner's public key.
        spec: the settings of splitting, compression and healing.
        home: the model owner's home folder, with its keys and its ledger.
        resume: whether to continue an interrupted distillation or search.

    Returns:
        The plan, and the checked packing with the opened base.

    Raises:
        OffsiteError: as for `check_packing`.
    """
    checked = check_packing(base, out, recipient, spec, home, resume=resume)
    model, sandwich, spec = checked.model, checked.sandwich, checked.spec
    keep, work = spec.kept(sandwich.middle), work_of(sandwich.middle, spec)
    # a rule that runs the network has not chosen yet; the sizes do not depend on its choice
    known = spec.changed({"select": "uniform"}) if spec.selection_rule.runs_blocks else spec
    emulator = select_blocks(model, sandwich, known, Path(), silent)
    emulator = fill_places(sandwich.middle, emulator, spec)
    files = _bundle_files(checked, sandwich.kept(emulator), spec)
    runs = runs_network(sandwich, spec)
    possible = possible_compute_dtypes(spec.runtime.compute, spec.runtime.device) if runs else ()
    plan = PackPlan(
        architecture=model.family.model_type,
        emulator=describe_emulator(model, sandwich, spec),
        work=_steps(model, sandwich, spec, work),
        base=_parts(model, sandwich, sandwich.middle, None),
        bundle=_parts(model, sandwich, emulator, DTYPES[spec.dtype], keep if work.adds_affine_layers else 0),
        files=files,
        memory=tuple(Memory(compute, _weights(model, sandwich, spec, work, compute)) for compute in possible),
        disk=(Amount("bundle", total(files)), *_scratch(model, spec, keep, work)),
        widths=_budget(model, emulator, spec) if spec.shares_budget else None,
    )
    return plan, checked


def _steps(model: BaseModel, sandwich: Sandwich, spec: PackSpec, work: Work) -> tuple[str, ...]:
    """The steps of packing that run the base's network, such as "heal by distill"."""
    chooses = spec.selection_rule.runs_blocks and spec.kept(sandwich.middle) < len(sandwich.middle)
    return (
        *([f"select by {spec.select.by}"] if chooses else []),
        *(["choose widths by budget"] if spec.shares_budget else []),
        *([f"narrow by {spec.narrow.by}"] if work.narrows else []),
        *([f"prune by {work.pruner.name}"] if work.pruner else []),
        *(f"heal by {healing_name(step, model, spec)}" for step in (*work.block_steps, *work.later_steps)),
    )


def _budget(model: BaseModel, emulator: Sequence[int], spec: PackSpec) -> str:
    """What a plan says about widths that only the calibration data decide.

    Args:
        model: the opened base.
        emulator: base indices of the emulator's blocks.
        spec: the settings, with the share of the multiply-adds that remains.
    """
    whole = base_multiply_adds(model, emulator)
    left = math.floor((spec.narrow.share or 1) * whole)
    return (
        f"at most {left:,} of the blocks' {whole:,} multiply-adds for a token stay; how many in which block is chosen "
        "when packing, so the sizes are those of even widths, and approximate"
    )


def _weights(model: BaseModel, sandwich: Sandwich, spec: PackSpec, work: Work, compute: Compute) -> tuple[Amount, ...]:
    """The sizes of weights, solvers and hidden states in memory while packing runs the network in this compute dtype.

    One block of the base is in memory at a time. Distillation and search also need the whole emulator.
    """
    item, family, block = ITEM_BYTES[compute], model.family, _largest_block(model)
    embeddings = part("", [model.tensors[name].shape for name in family.embedding_tensors(model.config)], 4)
    outer = part("", [model.tensors[name].shape for name in family.outer_tensors(model.config)], item)
    emulator, top = spec.kept(sandwich.middle) * block, len(sandwich.top) * block
    amounts = [Amount("embeddings in fp32", embeddings.bytes), Amount("one block in fp32", 4 * block)]
    if work.block_by_block:
        states = min(IN_MEMORY, _states_bytes(model, spec))
        amounts += [
            Amount("solver of the widest linear layer, about", _SOLVER_BYTES * _widest_input(model) ** 2),
            Amount("hidden states, at most", 3 * states),  # of the base, of the emulator, and those being made
        ]
    if work.later_steps:
        masters = 4 * emulator if item < 4 else 0
        amounts += [
            Amount("emulator that trains", item * emulator),
            Amount("its master weights, gradients and optimiser moments in fp32", masters + 12 * emulator),
        ]
    elif spec.select.by == "search":
        amounts.append(Amount("emulator", item * emulator))
    if (work.later_steps and spec.distill.ce) or spec.select.by == "search":
        amounts.append(Amount("top blocks, embeddings, norm and head", item * top + outer.bytes))
    return tuple(amounts)


def _scratch(model: BaseModel, spec: PackSpec, keep: int, work: Work) -> list[Amount]:
    """The sizes of intermediate results on disk, which are deleted when the bundle is written.

    `keep` is the number of kept blocks.
    """
    block = _largest_block(model)
    # the dtype of the hidden states may not be known yet: take the largest
    item = max(ITEM_BYTES[one] for one in possible_compute_dtypes(spec.runtime.compute, spec.runtime.device))
    states = 2 * spec.distill.tokens * _hidden(model) * item if work.later_steps else 0
    point = 5 * _states_bytes(model, spec) if work.block_by_block else 0  # two resume points, and those being made
    amounts = [
        Amount("hidden states to heal with and to resume from, at most", point),
        Amount("healed weights, until the bundle is written", _healed_bytes(model, spec, keep, work)),
        Amount("hidden states to distill on, at most", states),
        Amount("resume points, and the distilled weights", 28 * keep * block if work.later_steps else 0),
    ]
    return [amount for amount in amounts if amount.bytes]


def _healed_bytes(model: BaseModel, spec: PackSpec, keep: int, work: Work) -> int:
    """Bytes, in the bundle's dtype, of the tensors that block-by-block healing and pruning write to the scratch folder.

    `keep` is the number of kept blocks.
    """
    family, block, item = model.family, model.block(0), ITEM_SIZE[DTYPES[spec.dtype]]
    if not work.block_by_block:
        return 0
    if work.adds_affine_layers:
        return keep * part("", affine_shapes(_hidden(model)).values(), item).bytes
    pruned = [path for path in block if family.is_linear(family.in_block(0, path))] if work.pruner else []
    refitted = [path for refit in work.revisited for path in family.output_layers(refit)]
    patterns = {*pruned, *(f"{path}.{kind}" for path in refitted for kind in ("weight", "bias"))}
    return (
        keep * part("", [one.shape for path, one in block.items() if family.pattern_of(path) in patterns], item).bytes
    )


def _bundle_files(checked: Packing, kept: Sequence[int], spec: PackSpec) -> tuple[Amount, ...]:
    """All files of the bundle with their exact sizes.

    The manifest's size is exact too: values that are not known yet, such as hashes, have a fixed length.

    Args:
        checked: the checked packing.
        kept: base indices of the bundle's blocks, in order.
        spec: the settings.
    """
    model, dtype = checked.model, DTYPES[spec.dtype]
    numbers = counts(checked.sandwich, kept, spec)
    emulator = kept[numbers.bottom : numbers.bottom + numbers.emulator]
    widths = even_widths(model, emulator, spec) if spec.narrows else None
    declared = declared_of(model, numbers.bottom, emulator, spec, widths)
    weights = DECLARED_WEIGHTS if declared else WEIGHTS
    sizes = checkpoint_bytes(bundle_tensors(model, kept, {}, dtype, numbers, spec, declared), weights=weights)
    sizes |= {name: len(content) for name, content in settings_files(model, kept, dtype, declared).items()}
    entries = tuple(FileEntry(name=name, size=size, sha256=_UNKNOWN) for name, size in sorted(sizes.items()))
    parties = Parties(checked.identity.public_key.hex, checked.recipient.hex, _UNKNOWN)
    manifest = bundle_manifest(model, kept, numbers, spec, entries, parties, declared)
    sizes |= {MANIFEST: len(render_manifest(manifest)), SIGNATURE: SIGNATURE_BYTES}
    return tuple(Amount(name, size) for name, size in sorted(sizes.items()))


def _parts(
    model: BaseModel, sandwich: Sandwich, middle: Sequence[int], dtype: str | None, maps: int = 0
) -> tuple[Part, ...]:
    """The parts of the base or the bundle (embeddings, bottom, middle or emulator, top, norm, head) with their sizes.

    Args:
        model: the opened base.
        sandwich: the split of the base.
        middle: base indices of the blocks of the middle or the emulator.
        dtype: the dtype of the bundle, such as "BF16"; None for the base, whose own dtypes count.
        maps: number of affine layers in the emulator.
    """

    def made(name: str, tensors: Sequence[TensorRange], blocks: int = 0, maps: int = 0) -> Part:
        item = ITEM_SIZE[dtype or tensors[0].dtype] if tensors else 1
        behind = maps * list(affine_shapes(_hidden(model)).values())
        return part(name, [*(tensor.shape for tensor in tensors), *behind], item, blocks)

    def blocks(name: str, indices: Sequence[int], maps: int = 0) -> Part:
        return made(name, [tensor for index in indices for tensor in model.block(index).values()], len(indices), maps)

    def outer(name: str, names: Iterable[str]) -> Part:
        return made(name, [model.tensors[one] for one in names if one in model.tensors])

    return (
        outer("embeddings", model.family.embeddings),
        blocks("bottom", sandwich.bottom),
        blocks("middle" if dtype is None else "emulator", middle, maps),
        *([blocks("trained in between", sandwich.spread)] if sandwich.spread else []),
        blocks("top", sandwich.top),
        outer("final norm", model.family.final),
        outer("head", (model.family.head,)),
    )


def _states_bytes(model: BaseModel, spec: PackSpec) -> int:
    """The bytes of the hidden states of all calibration tokens after one block, in float32."""
    return 4 * spec.calibration.tokens * _hidden(model)


def _widest_input(model: BaseModel) -> int:
    """The largest number of inputs of a linear layer in the base's blocks."""
    axis = 0 if model.family.transposed else 1
    return max(
        (
            tensor.shape[axis]
            for index in range(model.blocks)
            for path, tensor in model.block(index).items()
            if len(tensor.shape) == 2 and model.family.is_linear(model.family.in_block(index, path))
        ),
        default=0,
    )


def _largest_block(model: BaseModel) -> int:
    """The number of parameters of the base's largest block."""
    return max(part("", [t.shape for t in model.block(i).values()], 1).parameters for i in range(model.blocks))


def _hidden(model: BaseModel) -> int:
    """The hidden size: the number of outputs of attention's output projection."""
    return model.block(0)[f"{model.family.attention_out}.weight"].shape[1 if model.family.transposed else 0]
