"""What packing and plugging in will do and need, before either does anything. Torch-free, without side effects.

docs/memory.md has the formulas in words; every term here carries its own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from offsite.config import PackSpec, PlugInSpec, RefitMap
from offsite.data.picture_sets import read_pictures
from offsite.data.picture_sizes import decoded, picture_count, seen_picture, spread
from offsite.errors import DataError, IncompatibleError
from offsite.kernels.memory_formulas import (
    CALIBRATION_BATCH,
    CHUNK_ELEMENTS,
    GROUP_TOKENS,
    JUDGED,
    SEARCH_TOKENS,
    BlockShape,
    Part,
    Phase,
    Term,
    block_shape,
    calibration_length,
    compute_bytes,
    copy_buffer,
    encoding,
    part,
    plain_libraries,
    torch_libraries,
)
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.calibration_pictures import photos
from offsite.model_owner.compress.declare import declared_of
from offsite.model_owner.heal.heal_steps import fill_places
from offsite.model_owner.intake import check_return, issued_bundle
from offsite.model_owner.pack import Parties, bundle_manifest
from offsite.model_owner.partition import DTYPES, bundle_tensors, counts
from offsite.model_owner.plug_in import checkpoint_of, form_of
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.model_owner.split import split
from offsite.model_owner.work import Work, work_of
from offsite.models.modules.declared import affine_shapes
from offsite.models.modules.declared_shapes import place_of_bottleneck
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import TOKENIZER_FILES, checkpoint_file
from offsite.protocol.home import Home
from offsite.protocol.manifest import FileEntry, render_manifest
from offsite.protocol.signing import SIGNATURE_BYTES
from offsite.storage.safetensors_files import (
    DECLARED_WEIGHTS,
    FLOATS,
    ITEM_SIZE,
    WEIGHTS,
    TensorRange,
    checkpoint_bytes,
    open_checkpoint,
)

_NOBODY = Parties(issuer="0" * 64, recipient="0" * 64, base="0" * 64)  # as long as anybody's key


@dataclass(frozen=True)
class Calibration:
    """The text that runs through the base: at most so many sequences of so many tokens."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """All tokens, at most: a shorter text gives fewer."""
        return self.sequences * self.length


@dataclass(frozen=True)
class PackPlan:
    """What `pack` will do and need."""

    architecture: str
    base: tuple[Part, ...]
    bundle: tuple[Part, ...]
    files: tuple[tuple[str, int], ...]  # of the bundle, with their sizes in bytes
    calibration: Calibration | None
    compute: Literal["bf16", "fp32"] | None  # of the network; None where none runs
    phases: tuple[Phase, ...]
    disk: tuple[Term, ...]

    @property
    def bundle_bytes(self) -> int:
        """Of all files of the bundle."""
        return sum(size for _, size in self.files)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def disk_bytes(self) -> int:
        """Room that is needed on the disk of the bundle's folder."""
        return sum(term.bytes for term in self.disk)


def plan_pack(base: Base, spec: PackSpec) -> PackPlan:
    """What packing a base with these settings will do and need; only its config and headers are read.

    Raises:
        UsageError: a setting does not fit the model.
        IncompatibleError: the model cannot be cut.
        StorageError: something cannot be read.
    """
    model = open_base(base)
    sandwich = split(model, spec)
    keep = spec.kept(sandwich.middle)
    dropped = keep < len(sandwich.middle)
    work = work_of(sandwich.middle, spec)
    searches = spec.select.by == "search" and dropped
    closed = work.block_by_block or (dropped and spec.selection_rule.runs_blocks)
    distills = bool(work.later_steps)
    runs = closed or distills
    # which blocks the calibration text will choose is known only after the work; their sizes do not depend on it
    emulator = select_blocks(model, sandwich, _without_work(spec), Path(), silent)
    emulator = fill_places(sandwich.middle, emulator, spec)
    kept = sandwich.kept(emulator)
    files = _bundle_files(model, sandwich, kept, spec)
    item = compute_bytes(spec.runtime.compute, spec.runtime.device)
    calibration, material = _calibration(model, spec) if runs else (None, ())
    length = calibration.length if calibration else calibration_length(model.config)
    phases = _network_phases(model, calibration, item, material, work) if calibration and closed else []
    states = _state_tokens(spec, length, distills=distills, searches=searches)
    if states:
        phases += _stack_phases(model, sandwich, spec, item, material, length, distills=distills, searches=searches)
    libraries = torch_libraries(_tokenizer_bytes(model.folder)) if runs else (plain_libraries(),)
    cast = any(tensor.dtype in FLOATS and tensor.dtype != DTYPES[spec.dtype] for tensor in model.tensors.values())
    phases.append(Phase("writing the bundle", (*libraries, copy_buffer(_largest(model), cast=cast))))
    scratch = _scratch(model, spec, keep, item, states, work)
    return PackPlan(
        architecture=model.family.model_type,
        base=_parts(model, sandwich, sandwich.middle, None),
        bundle=_parts(model, sandwich, emulator, DTYPES[spec.dtype], keep if work.maps else 0),
        files=tuple(sorted(files.items())),
        calibration=calibration,
        compute={2: "bf16", 4: "fp32"}[item] if runs else None,  # type: ignore[arg-type]
        phases=tuple(phases),
        disk=(Term("bundle", sum(files.values()), "all its files"), *scratch),
    )


def _calibration(model: BaseModel, spec: PackSpec) -> tuple[Calibration, tuple[Term, ...]]:
    """How much runs through the base, and what it takes in memory itself."""
    if model.family.vision is None:
        length = calibration_length(model.config)
        return Calibration(spec.calibration.tokens // length, length), (encoding(_text_bytes(spec.calibration.source)),)
    seen = seen_picture(model.folder, model.family, model.config)
    fitted, distilled = (
        picture_count(seen, model.config, tokens)
        for tokens in (spec.calibration.tokens, spec.distill.tokens if "distill" in spec.heal.steps else 1)
    )
    most = max(fitted, distilled)
    chosen = (
        spread(read_pictures(spec.calibration.source, labelled=False), most) if spec.calibration.source else photos()
    )
    if spec.calibration.source:  # of a photo there are many crops
        fitted, most = min(fitted, len(chosen)), len(chosen)
    prepared = Term("prepared pictures", most * seen.bytes, "12 * height * width each")
    return Calibration(fitted, seen.tokens), (decoded(chosen), prepared)


def _without_work(spec: PackSpec) -> PackSpec:
    return spec.changed({"select": "uniform"}) if spec.selection_rule.runs_blocks else spec


def _state_tokens(spec: PackSpec, length: int, *, distills: bool, searches: bool) -> int:
    """Tokens whose hidden states lie on the disk, at most."""
    judging = min(spec.calibration.tokens, SEARCH_TOKENS) // JUDGED if searches else 0
    return judging + (spec.distill.tokens // length * length if distills else 0)


def _scratch(model: BaseModel, spec: PackSpec, keep: int, item: int, states: int, work: Work) -> list[Term]:
    """What lies beside the bundle until it is written."""
    hidden, numbers = _block_sizes(model).hidden, _numbers(model.block(0))
    terms = [
        Term(
            "healed weights, until the bundle is written",
            _healed_bytes(model, spec, keep, work),
            "k * P_a * d" if work.maps else "k * F * H * d (A for attention's), pruned k * P_b * d",
        ),
        Term("hidden states around the middle", 2 * states * hidden * item, "2 * N * H * c"),
        Term(
            "resume points, and the distilled weights", 28 * keep * numbers if work.later_steps else 0, "28 * k * P_b"
        ),
    ]
    return [term for term in terms if term.bytes]


def _parts(
    model: BaseModel, sandwich: Sandwich, middle: Sequence[int], dtype: str | None, maps: int = 0
) -> tuple[Part, ...]:
    """The model in parts, stored as the base is, or in the bundle's dtype with so many maps behind its blocks."""

    def made(
        name: str, tensors: Sequence[TensorRange], blocks: int = 0, beside: Sequence[tuple[int, ...]] = ()
    ) -> Part:
        item = ITEM_SIZE[dtype or tensors[0].dtype] if tensors else 1
        return part(name, [*(tensor.shape for tensor in tensors), *beside], item, blocks)

    def blocks(name: str, indices: Sequence[int], beside: Sequence[tuple[int, ...]] = ()) -> Part:
        held = [tensor for index in indices for tensor in model.block(index).values()]
        return made(name, held, len(indices), beside)

    def outer(name: str, names: Iterable[str]) -> Part:
        return made(name, [model.tensors[one] for one in names if one in model.tensors])

    family = model.family
    return (
        outer("embeddings", family.embeddings),
        blocks("bottom", sandwich.bottom),
        blocks("middle" if dtype is None else "emulator", middle, maps * _map_shapes(model)),
        *([blocks("trained in between", sandwich.spread)] if sandwich.spread else []),
        blocks("top", sandwich.top),
        outer("final norm", family.final),
        outer("head", (family.head,)),
    )


def _bundle_files(model: BaseModel, sandwich: Sandwich, kept: Sequence[int], spec: PackSpec) -> dict[str, int]:
    """Every file of the bundle with its exact size: the manifest names no number that is not known before."""
    dtype = DTYPES[spec.dtype]
    numbers = counts(sandwich, kept)
    emulator = kept[numbers.bottom : numbers.bottom + numbers.emulator]
    declared = declared_of(model, numbers.bottom, emulator, spec)
    weights = DECLARED_WEIGHTS if declared else WEIGHTS
    sizes = checkpoint_bytes(bundle_tensors(model, kept, {}, dtype, numbers, spec), weights=weights)
    sizes |= {name: len(content) for name, content in settings_files(model, kept, dtype, declared).items()}
    entries = tuple(FileEntry(name=name, size=size, sha256="0" * 64) for name, size in sorted(sizes.items()))
    manifest = bundle_manifest(model, kept, numbers, spec, entries, _NOBODY, declared)
    return {**sizes, "offsite.json": len(render_manifest(manifest)), "offsite.json.sig": SIGNATURE_BYTES}


def _healed_bytes(model: BaseModel, spec: PackSpec, keep: int, work: Work) -> int:
    family, block = model.family, model.block(0)
    if not work.block_by_block:
        return 0
    if work.maps:
        return keep * part("", _map_shapes(model), ITEM_SIZE[DTYPES[spec.dtype]]).bytes
    pruned = [f"{path}.weight" for path in family.linears] if work.pruner else []
    refitted = [family.output_of(part)[0] for part in work.revisited]
    paths = {*pruned, *(f"{path}.{kind}" for path in refitted for kind in ("weight", "bias"))}
    solved = part("", [block[path].shape for path in paths if path in block], ITEM_SIZE[DTYPES[spec.dtype]])
    return keep * solved.bytes


def _map_shapes(model: BaseModel) -> list[tuple[int, ...]]:
    """What an affine map behind a block holds."""
    return list(affine_shapes(_block_sizes(model).hidden).values())


def _largest(model: BaseModel) -> int:
    return max(tensor.size for tensor in model.tensors.values())


def _numbers(tensors: Mapping[str, TensorRange]) -> int:
    return part("", [tensor.shape for tensor in tensors.values()], 1).parameters


def _tokenizer_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in TOKENIZER_FILES if (folder / name).is_file())


def _text_bytes(file: Path | None) -> int:
    if file is None:
        return len((resources.files("offsite.model_owner") / "calibration.txt").read_bytes())
    try:
        return file.stat().st_size if file.is_file() else sum(one.stat().st_size for one in file.rglob("*.*"))
    except OSError as error:
        raise DataError(f"cannot read the calibration text {file}", reasons=[str(error)]) from None


def _network_phases(
    model: BaseModel, calibration: Calibration, item: int, material: tuple[Term, ...], work: Work
) -> list[Phase]:
    """Running the blocks over the calibration text one at a time, and solving for their projections, or maps behind."""
    family = model.family
    tensors = max(map(model.block, range(model.blocks)), key=_numbers)
    sizes = _block_sizes(model)
    embeddings = part("", [model.tensors[name].shape for name in family.embedding_tensors(model.config)], 4)
    states = 2 if work.block_by_block else 1
    always = (
        *torch_libraries(_tokenizer_bytes(model.folder)),
        *material,
        Term("embeddings in fp32", embeddings.bytes, "4 * P_e"),
        Term(
            "hidden states, base and emulator" if work.block_by_block else "hidden states",
            states * 4 * calibration.tokens * sizes.hidden,
            f"{states * 4} * N * H",
        ),
        Term("one block in fp32", 4 * sizes.parameters, "4 * P_b"),
        *([Term("the map behind it", 4 * part("", _map_shapes(model), 1).parameters, "4 * P_a")] if work.maps else []),
        Term("what reading a tensor holds", max(t.size for t in tensors.values()), "its bytes as stored"),
    )
    phases = [Phase("running the blocks", (*always, *_forward(sizes, calibration, item)))]
    if work.pruner:
        phases.append(Phase("pruning a block's maps", (*always, *_pruning(model, sizes, calibration, item, work))))
    for solved in dict.fromkeys(work.revisited) if not work.maps else (None,):
        what = _SOLVED[solved]
        summing, solving = _summing(sizes, calibration, item, solved), _solving(sizes, solved)
        phases.append(Phase(f"summing up {what}'s problem", (*always, *summing)))
        phases.append(Phase(f"solving for {what}", (*always, *solving)))
    return phases


def _block_sizes(model: BaseModel) -> BlockShape:
    tensors = max(map(model.block, range(model.blocks)), key=_numbers)
    return block_shape(model.family, {path: tensor.shape for path, tensor in tensors.items()}, model.config)


def _stack_phases(
    model: BaseModel,
    sandwich: Sandwich,
    spec: PackSpec,
    item: int,
    material: tuple[Term, ...],
    length: int,
    *,
    distills: bool,
    searches: bool,
) -> list[Phase]:
    """Running a whole emulator from hidden states on the disk: to train it, or to judge it."""
    keep = spec.kept(sandwich.middle)
    sizes, family = _block_sizes(model), model.family
    maps = part("", _map_shapes(model), 1).parameters if work_of(sandwich.middle, spec).maps else 0
    stack, top = keep * (sizes.parameters + maps), len(sandwich.top) * sizes.parameters
    outer = part("", [model.tensors[name].shape for name in family.outer_tensors(model.config)], item).bytes
    batch = CALIBRATION_BATCH * length
    groups = min(GROUP_TOKENS, max(spec.distill.tokens, 1))
    always = (*torch_libraries(_tokenizer_bytes(model.folder)), *material)
    end = Term("embeddings, norm and head", outer, "c * P_o")
    whole = bool(spec.distill.ce)
    logits = Term("logits of a chunk, their logs and slopes", 3 * 4 * CHUNK_ELEMENTS, "12 * chunk")
    phases = [
        Phase(
            "keeping hidden states of the base",
            (
                *always,
                Term("hidden states of a group", 3 * 4 * groups * sizes.hidden, "12 * N_g * H"),
                Term("one block in fp32", 4 * sizes.parameters, "4 * P_b"),
                *_forward(sizes, Calibration(CALIBRATION_BATCH, length), item),
            ),
        )
    ]
    if searches:
        terms = (Term("emulator and top", item * (stack + top), "c * (k + t) * P_b"), end, logits)
        activations = Term("activations of one block", batch * sizes.forward(item), "n * (c * (Q + A + F) + 8 * H)")
        phases.append(Phase("judging a selection", (*always, *terms, activations)))
    if distills:
        masters = 16 * stack + (item * stack if item < 4 else 0)
        terms = (
            Term("trained weights, gradients and moments", masters, "(16 + c) * k * P_b, 16 * k * P_b in fp32"),
            Term("top, frozen", item * top if whole else 0, "c * t * P_b"),
            end,
            Term(
                "activations of one batch, kept for the gradient",
                2 * (keep + (len(sandwich.top) if whole else 0)) * batch * sizes.forward(item),
                "2 * k * n * (c * (Q + A + F) + 8 * H)",
            ),
            *((logits,) if whole else ()),
        )
        phases.append(Phase("distilling", (*always, *terms)))
    return phases


def _forward(sizes: BlockShape, calibration: Calibration, item: int) -> list[Term]:
    tokens = min(CALIBRATION_BATCH, calibration.sequences) * calibration.length
    terms = [
        Term("activations of one batch", tokens * sizes.forward(item), "n * (c * (Q + A + F) + 8 * H)"),
        Term("hidden states of one batch, in and out", 12 * tokens * sizes.hidden, "12 * n * H"),
    ]
    if item < 4:
        terms.append(Term("one block in bf16", item * sizes.parameters, "c * P_b"))
    return terms


def _summing(sizes: BlockShape, calibration: Calibration, item: int, solved: RefitMap | None) -> list[Term]:
    tokens = min(CALIBRATION_BATCH, calibration.sequences) * calibration.length
    (f, h), name = _sides(sizes, solved)
    return [
        *_forward(sizes, calibration, item),
        Term("sums of squares, fitted and held out", 2 * 4 * (f * f + f * h), f"8 * ({name}^2 + {name} * H)"),
        Term("a batch's sums", 4 * f * f, f"4 * {name}^2"),
        *([Term("the projection in fp64", 8 * f * h, f"8 * {name} * H")] if solved else []),
        Term("features of one batch, plain and weighted", 8 * tokens * f, f"8 * n * {name}"),
    ]


def _pruning(model: BaseModel, sizes: BlockShape, calibration: Calibration, item: int, work: Work) -> list[Term]:
    """Sums of squares of what enters every map but those that refit goes through, and the largest of these pruned."""
    family, block = model.family, model.block(0)
    refitted = {family.output_of(part)[0] for part in work.revisited}
    shapes = [block[f"{path}.weight"].shape for path in family.linears if path not in refitted]
    inputs = [shape[0] if family.transposed else shape[1] for shape in shapes]
    widest = max(inputs)
    return [
        *_forward(sizes, calibration, item),
        Term("sums of squares, at most one for each map", 4 * sum(one * one for one in inputs), "4 * sum of I^2"),
        Term("a batch's sums", 4 * widest * widest, "4 * I^2"),
        Term("system, factor and inverse in fp64", 3 * 8 * widest * widest, "24 * I^2"),
        Term("a matrix, pruned, with what each number's going costs", 5 * 4 * max(map(math.prod, shapes)), "20 * P_m"),
    ]


def _solving(sizes: BlockShape, solved: RefitMap | None) -> list[Term]:
    (f, h), name = _sides(sizes, solved)
    what = "projection" if solved else "map"
    return [
        Term("sums of squares, fitted, held out, together", 3 * 4 * (f * f + f * h), f"12 * ({name}^2 + {name} * H)"),
        Term("system and factor in fp64", 2 * 8 * f * f, f"16 * {name}^2"),
        Term(f"right sides, solution, {what} in fp64", 4 * 8 * f * h, f"32 * {name} * H"),
    ]


_SOLVED: Mapping[RefitMap | None, str] = {
    "mlp": "a projection",
    "attention": "an attention's projection",
    None: "a map",  # behind a block
}


def _sides(sizes: BlockShape, solved: RefitMap | None) -> tuple[tuple[int, int], str]:
    """Inputs and outputs of what is solved, and the symbol of the inputs; a bias, one input more, is left out."""
    inputs, name = {"mlp": (sizes.inner, "F"), "attention": (sizes.attended, "A"), None: (sizes.hidden, "H")}[solved]
    return (inputs, sizes.hidden), name


@dataclass(frozen=True)
class PlugInPlan:
    """What `plug-in` will do and need."""

    form: Literal["adapter", "merged"]
    changed: int  # base tensors that change (merged), or pairs (adapter)
    changed_parameters: int
    phases: tuple[Phase, ...]
    disk: tuple[Term, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def disk_bytes(self) -> int:
        """Room that is needed on the disk of the plug-in's folder."""
        return sum(term.bytes for term in self.disk)


def plan_plug_in(base: Base, returned: Path, spec: PlugInSpec, home: Home) -> PlugInPlan:
    """What plugging a return into a base will do and need; the return is verified, and nothing is recorded.

    Raises:
        VerificationError: the return fails verification.
        PolicyError: it goes beyond what was permitted.
        UsageError: the return's method has no such form, or it has no such checkpoint.
        IncompatibleError: the base has other blocks than the bundle's.
    """
    verified = check_return(returned, home)
    parent = issued_bundle(verified, home)
    model = open_base(base)
    lora, family = verified.manifest.lora, model.family
    form = form_of(verified, spec)
    checkpoint_of(verified, spec)
    names = (
        [family.name_of(f"{target}.weight") or "" for target in lora.targets]
        if lora
        else list(verified.manifest.tensors)
    )
    if verified.manifest.bottleneck:
        places = {place_of_bottleneck(name) or "" for name in names}
        names = sorted(f"{place}.weight" for place in places if place.endswith(f".{family.attention_out}"))
    changed = []
    for name in names:
        place = family.block_of(name)
        found = model.tensors.get(family.in_block(parent.kept[place[0]], place[1])) if place else None
        if found is None:
            raise IncompatibleError(f"{base.folder} has no tensor for {name[:200]} of the return")
        changed.append(found)
    largest, copies = max(changed, key=lambda tensor: tensor.size), copy_buffer(_largest(model), cast=False)
    if form == "adapter":
        others = {checkpoint_file(number) for number in range(1, verified.manifest.checkpoints)}  # all of one size
        writing, disk = copies, sum(entry.size for entry in verified.manifest.files if entry.name not in others)
    else:
        writing, disk = _merging(largest), open_checkpoint(base.folder).size + _tokenizer_bytes(base.folder)
    return PlugInPlan(
        form=form,
        changed=len(changed),
        changed_parameters=part("", [tensor.shape for tensor in changed], 1).parameters,
        phases=(
            Phase("verifying, and comparing the base", (plain_libraries(), copies)),
            Phase("writing the plug-in", (plain_libraries(), max(writing, copies, key=lambda t: t.bytes))),
        ),
        disk=(Term("plug-in", disk, "its weights, and the tokenizer where it is merged"),),
    )


def _merging(largest: TensorRange) -> Term:
    """The largest changed tensor: base, change and sum in fp32 (12), two steps of rounding (8), the result (2)."""
    elements = largest.size // ITEM_SIZE[largest.dtype]
    return Term("the largest changed tensor, in steps", 22 * elements, "22 * its numbers")
