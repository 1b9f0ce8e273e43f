"""What tuning will do and need, before it does anything. Torch-free, without side effects.

docs/memory.md has the formulas in words; every term here carries its own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from offsite.config import Method, TuneSpec
from offsite.data.picture_sets import read_pictures, split_by_seed
from offsite.data.picture_sizes import SeenPicture, at_once, decoded, seen_picture
from offsite.data.rows import read_rows
from offsite.data.tokens import encode
from offsite.data_owner.permissions import require_permitted, resolve_defaults
from offsite.kernels.memory_formulas import (
    SHORT_ATTENTION,
    BlockShape,
    Part,
    Phase,
    Term,
    allocator,
    block_shape,
    compute_bytes,
    loss_chunk,
    part,
    torch_libraries,
    usual_lanes,
)
from offsite.kernels.threads import usual_threads
from offsite.models.architectures import ARCHITECTURES, Architecture
from offsite.models.modules.declared import unwrapped
from offsite.protocol.artifacts import Bundle
from offsite.protocol.contents import CONFIG, TOKENIZER_FILES
from offsite.protocol.manifest import BottleneckSettings, BundleManifest, LoraSettings, TensorEntry
from offsite.protocol.output_head import returned_head
from offsite.protocol.peft_adapter import adapter_tensors
from offsite.protocol.return_rules import classifier_inputs
from offsite.storage.safetensors_files import ITEM_SIZE, TensorRange, open_checkpoint, strict_json
from offsite.training.schedule import checkpoint_steps, step_count


@dataclass(frozen=True)
class TunePlan:
    """What `tune` will do and need."""

    architecture: str
    method: Method
    bundle: tuple[Part, ...]
    trained_tensors: int
    trained_parameters: int
    rows: int
    steps: int
    row_tokens: int  # of the longest row that the settings permit
    micro_batch_tokens: int  # padded tokens that run at once, at most
    compute: Literal["bf16", "fp32"]
    phases: tuple[Phase, ...]
    disk: tuple[Term, ...]

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def disk_bytes(self) -> int:
        """Room that is needed on the disk of the return's folder."""
        return sum(term.bytes for term in self.disk)


@dataclass(frozen=True)
class _Sizes:
    """What the formulas are about."""

    block: BlockShape
    vocabulary: int
    parameters: int  # of the bundle
    stored: int  # bytes of the bundle's weights
    same_dtype: bool  # whether they are stored in the dtype of the arithmetic
    trained: int  # numbers that train
    largest: int  # of the largest tensor that trains
    through: int  # blocks that the gradient goes through
    training: int  # blocks of which something trains
    tokens: int  # that run at once, in all lanes
    lanes: int
    length: int  # of a row
    item: int  # bytes of a number in the arithmetic
    method: Method
    width: int  # of bottlenecks
    head: int  # numbers of the head, where it trains
    seen: "_Seen | None"  # what is about pictures
    scaled: bool  # whether what attention and MLP give is multiplied by a scale before it is added

    @property
    def kept(self) -> int:
        """Bytes of a token that a block keeps for the backward pass."""
        return self.block.kept(self.item) + (2 * self.item * self.block.hidden if self.scaled else 0)


@dataclass(frozen=True)
class _Seen:
    """The pictures of a run."""

    rows: int
    picture: SeenPicture
    classifier: int  # P_c: numbers of the new classifier
    features: int  # that it reads of a picture
    decoded: Term


def _seen(bundle: Bundle, data: Path, spec: TuneSpec) -> _Seen:
    """Listed, and sizes read from their headers; none is decoded."""
    manifest, folder = bundle.manifest, bundle.folder
    listed = read_pictures(data, part="train")
    train = split_by_seed(listed, spec.images.eval_share, spec.seed)[0] if spec.images.eval_share else listed
    classes, inputs = len({picture.label for picture in train}), classifier_inputs(manifest) or 0
    config = unwrapped(strict_json((folder / CONFIG).read_bytes()))[0]
    picture = seen_picture(folder, ARCHITECTURES[manifest.architecture], config)
    return _Seen(len(train), picture, classes * (inputs + 1), inputs, decoded(listed))


def _row_count(folder: Path, data: Path, length: int) -> int:
    rows = read_rows(data)
    if not rows[0].document:
        return len(rows)
    from offsite.models.tokenizers import load_tokenizer

    return len(encode(rows, load_tokenizer(folder), source=data, max_length=length).examples)


def plan_tune(bundle: Bundle, data: Path, spec: TuneSpec) -> TunePlan:
    """What tuning a verified bundle with these settings will do and need.

    Rows are counted and not tokenised, so those that would be left out for their length count too; a plain text alone
    is cut into its blocks, for which torch is loaded.

    Raises:
        IncompatibleError: the method has nothing to train in this model.
        PolicyError: the bundle does not permit the method or the rank.
        DataError: the rows cannot be read.
        UsageError: there are fewer steps than checkpoints, or checkpoints of pictures.
        StorageError: the bundle cannot be read.
    """
    manifest, folder = bundle.manifest, bundle.folder
    require_permitted(manifest, spec)
    family = ARCHITECTURES[manifest.architecture]
    config, declared = unwrapped(strict_json((folder / CONFIG).read_bytes()))
    tensors = open_checkpoint(folder).tensors
    item = compute_bytes(spec.runtime.compute, spec.runtime.device)
    spec = resolve_defaults(spec, manifest.architecture, item)
    returned = returned_tensors(manifest, spec)
    seen = _seen(bundle, data, spec) if family.vision is not None else None
    context = config.get("max_position_embeddings") or config.get("n_positions") or 2**31
    length = seen.picture.tokens if seen else min(spec.rows.max_length, int(context))
    rows = seen.rows if seen else _row_count(folder, data, length)
    checkpoint_steps(spec, step_count(spec, rows))
    lanes = 1 if seen else _lanes(spec)
    alone = max(spec.tokens_at_once // lanes, length)
    lanes = 1 if spec.length.batch_size * length <= alone else lanes
    tokens = min(max(spec.tokens_at_once, lanes * length), spec.length.batch_size * length)
    tokens = min(at_once(length, spec.tokens_at_once), spec.length.batch_size, rows) * length if seen else tokens
    parts = _parts(family, manifest, tensors)
    first = manifest.split.trained[0]
    # blocks of our own kinds keep no more for the backward pass than those of the family, and are counted as such
    measured = manifest.split.trained if declared else range(first, manifest.split.blocks)
    blocks = (_block(family, tensors, index) for index in measured)
    shapes = [block_shape(family, {path: one.shape for path, one in block.items()}, config) for block in blocks]
    numbers = [math.prod(entry.shape) for entry in returned.values()]
    sizes = _Sizes(
        block=max(shapes, key=lambda shape: shape.kept(item)),
        vocabulary=0 if seen else tensors[family.embedding_tensors(config)[0]].shape[0],
        parameters=sum(one.parameters for one in parts),
        stored=sum(one.bytes for one in parts),
        same_dtype=all(ITEM_SIZE[tensor.dtype] == item for tensor in tensors.values()),
        trained=sum(numbers) + (seen.classifier if seen else 0),
        largest=max(*numbers, *_stacks(family, tensors, returned)),
        through=manifest.split.blocks - first,
        training=len(manifest.split.trained),
        tokens=tokens,
        lanes=lanes,
        length=length,
        item=item,
        method=spec.adapter.method,
        width=spec.adapter.width,
        head=sum(math.prod(entry.shape) for entry in manifest.head.values()) if spec.adapter.tune_head else 0,
        seen=seen,
        scaled=family.mlp_scale is not None,
    )
    tokenizer = sum((folder / name).stat().st_size for name in TOKENIZER_FILES if (folder / name).is_file())
    return TunePlan(
        architecture=manifest.architecture,
        method=spec.adapter.method,
        bundle=parts,
        trained_tensors=len(returned) + (2 if seen else 0),
        trained_parameters=sizes.trained,
        rows=rows,
        steps=step_count(spec, rows),
        row_tokens=length,
        micro_batch_tokens=tokens,
        compute="bf16" if item == 2 else "fp32",
        phases=_phases(sizes, tokenizer),
        disk=(
            Term("resume points, the old and the new", 24 * sizes.trained, "2 * 12 * P_t"),
            Term("checkpoints, in the run's folder", 4 * sizes.trained * (spec.points.checkpoints - 1), "4 * P_t each"),
            Term("return", 4 * sizes.trained * spec.points.checkpoints, "4 * P_t, for each checkpoint"),
        ),
    )


def returned_tensors(manifest: BundleManifest, spec: TuneSpec) -> dict[str, TensorEntry]:
    """The tensors that a return with these settings will hold, by name: what trains."""
    if spec.adapter.method == "bottleneck":
        return BottleneckSettings(width=spec.adapter.width).tensors(manifest)
    head = returned_head(manifest, spec.adapter.method) if spec.adapter.tune_head else {}
    if spec.adapter.method != "lora":
        return manifest.own_tensors(spec.adapter.method) | head
    alpha = float(spec.adapter.lora_alpha or 2 * spec.adapter.rank)
    lora = LoraSettings(rank=spec.adapter.rank, alpha=alpha, targets=tuple(manifest.lora_targets))
    return adapter_tensors(lora, manifest.lora_targets) | head


def _stacks(
    family: Architecture, tensors: Mapping[str, TensorRange], returned: Mapping[str, TensorEntry]
) -> Iterator[int]:
    """Numbers in each stack of experts that trains: it is one tensor in memory, and many in the return."""
    experts = family.experts
    if experts is None:
        return
    for index in {place[0] for name in returned if (place := family.block_of(name))}:
        block = _block(family, tensors, index)
        for maps in experts.stacks.values():
            ends = tuple(f".{path}.weight" for path in maps)
            matrices = [path for path in block if path.startswith(f"{experts.path}.") and path.endswith(ends)]
            yield sum(math.prod(block[path].shape) for path in matrices if family.in_block(index, path) in returned)


def _block(family: Architecture, tensors: Mapping[str, TensorRange], index: int) -> dict[str, TensorRange]:
    places = ((family.block_of(name), tensor) for name, tensor in tensors.items())
    return {place[1]: tensor for place, tensor in places if place is not None and place[0] == index}


def _parts(family: Architecture, manifest: BundleManifest, tensors: Mapping[str, TensorRange]) -> tuple[Part, ...]:
    split = manifest.split
    inside = {"trained in between": len(split.spread)} if split.spread else {}
    blocks = {"bottom": split.bottom, "emulator": split.emulator - len(split.spread), **inside, "top": split.top}
    held: dict[str, list[TensorRange]] = {name: [] for name in ("embeddings", *blocks, "final norm", "head")}
    for name, tensor in tensors.items():
        place = family.block_of(name)
        if place is None:
            where = "embeddings" if name in family.embeddings else "head" if name == family.head else "final norm"
        elif place[0] in split.spread:
            where = "trained in between"
        else:
            index = place[0]
            where = "bottom" if index < split.bottom else "emulator" if index < split.bottom + split.emulator else "top"
        held[where].append(tensor)
    return tuple(
        part(name, [one.shape for one in there], ITEM_SIZE[there[0].dtype] if there else 1, blocks.get(name, 0))
        for name, there in held.items()
    )


def _phases(sizes: _Sizes, tokenizer: int) -> tuple[Phase, ...]:
    libraries = torch_libraries(tokenizer)
    weights = Term("weights", sizes.item * sizes.parameters, "c * P")
    always = (*libraries, weights, *_trained(sizes), *([sizes.seen.decoded] if sizes.seen else []))
    kept = _activations(sizes)
    in_flight = Term(
        "gradients of one block's activations",
        sizes.tokens * sizes.kept,
        "n * c * (Q + A + F' + 2 * H)",
    )
    working = Term("gradients of micro-batches", sizes.lanes * sizes.item * sizes.trained, "lanes * c * P_t")
    logits = _pixels(sizes, sizes.seen) if sizes.seen else _logits(sizes)
    summed = Term("sum of the head's gradient, and one chunk's", (4 + sizes.item) * sizes.head, "(4 + c) * P_h")
    scaled = Term("the head's gradient: sum, scaled, in c", (8 + sizes.item) * sizes.head, "(8 + c) * P_h")
    of_head = Phase("gradient of the head", (*always, *kept, scaled, allocator(kept)))
    return (
        Phase(
            "forward pass and loss",
            (*always, *kept, logits, *([summed] if sizes.head else []), allocator((*kept, logits))),
        ),
        *([of_head] if sizes.head else []),
        *([_without_gradients(sizes, sizes.seen, always)] if sizes.seen else []),
        Phase("backward pass", (*always, *kept, in_flight, allocator((*kept, in_flight)), working)),
        Phase("writing a resume point", (*always, Term("one tensor's bytes", 4 * sizes.largest, "4 * largest P_t"))),
    )


def _logits(sizes: _Sizes) -> Term:
    chunk = loss_chunk(sizes.tokens // sizes.lanes, sizes.vocabulary, sizes.item)
    return replace(chunk, bytes=sizes.lanes * chunk.bytes, formula=f"lanes * ({chunk.formula}), with n / lanes for n")


def _lanes(spec: TuneSpec) -> int:
    """Lanes of a tuning on text on a processor; tuning itself also looks whether passes would disturb one another."""
    if not spec.runtime.device.startswith(("auto", "cpu")) or spec.adapter.tune_head:
        return 1
    return spec.memory.lanes or usual_lanes(
        spec.runtime.threads or usual_threads(), compute_bytes(spec.runtime.compute, spec.runtime.device)
    )


def _pixels(sizes: _Sizes, seen: _Seen) -> Term:
    count = sizes.tokens // sizes.length
    return Term("pixels of what runs at once, twice", 2 * count * seen.picture.bytes, "2 * 12 * height * width * n / T")


def _without_gradients(sizes: _Sizes, seen: _Seen, always: tuple[Term, ...]) -> Phase:
    """What the probe and validation need, of which the latter runs twice as many pictures."""
    forward = Term(
        "activations of one block, pixels among them",
        2 * (sizes.tokens * sizes.block.forward(sizes.item) + _pixels(sizes, seen).bytes),
        "2 * n * (c * (Q + A + F) + 8 * H), and pixels",
    )
    features = Term("features of all pictures, and two copies", 12 * seen.rows * seen.features, "12 * rows * F_c")
    return Phase("the probe, and validation", (*always, forward, features, allocator((forward,))))


def _trained(sizes: _Sizes) -> list[Term]:
    """What lies in memory for the numbers that train, all of it from the first step on."""
    beside = {"lora": "pairs", "bottleneck": "bottlenecks"}.get(sizes.method)  # these are no part of the bundle
    classifier = sizes.seen.classifier if sizes.seen else 0
    added = sizes.item * (sizes.trained - sizes.head - classifier)
    terms = [Term(f"{beside} in the network", added, "c * (P_t - P_h)")] if beside else []
    if sizes.item < 4:
        terms.append(Term("masters in fp32", 4 * sizes.trained, "4 * P_t"))
    elif classifier:
        terms.append(Term("classifier in fp32", 4 * classifier, "4 * P_c"))
    terms.append(Term("gradients in fp32", 4 * sizes.trained, "4 * P_t"))
    terms.append(Term("AdamW's moments", 8 * sizes.trained, "8 * P_t"))
    return terms


def _activations(sizes: _Sizes) -> list[Term]:
    """What the forward pass keeps for the backward one, of the blocks that the gradient goes through."""
    block, item = sizes.block, sizes.item
    short = not sizes.seen and min(sizes.length, SHORT_ATTENTION)
    attention = max(
        block.attention(item, short, short=True) if short else 0,
        block.attention(item, sizes.length, short=False) if sizes.length > (short or 0) else 0,
    )
    terms = [
        Term(
            "activations of the blocks",
            sizes.through * sizes.tokens * sizes.kept,
            "m * n * c * (Q + A + F' + 2 * H)",
        ),
        Term(
            "attention of the blocks",
            sizes.through * sizes.tokens * attention,
            "m * n * c * max(heads * min(T, 128), T)",
        ),
    ]
    inputs = sizes.training * sizes.tokens * block.trained(item, sizes.method, sizes.width)
    if inputs:
        formula = "t * n * c * (4 * H + F), or (2 * H + F) for LoRA"
        if sizes.method == "bottleneck":
            formula = "t * n * c * (2 * H + 4 * width)"
        terms.append(Term("inputs of what trains", inputs, formula))
    return terms
