"""Rules for a bundle: a checkpoint of a known family that matches its manifest and contains nothing executable."""

import itertools
from collections.abc import Iterator
from typing import Any

from offsite.errors import IncompatibleError, VerificationError
from offsite.models.block_widths import obstacles
from offsite.models.families.architectures import Architecture, config_problems
from offsite.models.families.config_values import value_problems
from offsite.models.families.declared_family import declared_config_problems
from offsite.models.modules.declared import OF_MIXTURES, Declared, Expected, unwrapped
from offsite.protocol.contents import (
    ALLOWED_KEYS,
    CHAT_TEMPLATE,
    CONFIG,
    TOKENIZER,
    VOCABULARY,
    allowed_in_bundle,
    content_problems,
    is_weights,
    tokenizer_digest,
)
from offsite.protocol.manifest import (
    BundleManifest,
)
from offsite.protocol.signed_folder import Rule, SignedFolder, entries_differ, names_differ, read_json
from offsite.protocol.tokenizer_rules import tokenizer_problems, vocabulary_problems
from offsite.storage.checkpoint_folder import (
    DECLARED_INDEX,
    DECLARED_WEIGHTS,
    INDEX,
    WEIGHTS,
    Checkpoint,
    checkpoint_of,
)
from offsite.storage.safetensors_files import FLOATS, TensorRange

TOKENIZER_BYTES = 128 * 2**20  # no tokenizer.json or vocab.json is larger
_TEMPLATE_BYTES = 2**20
_MOST_FINDINGS = 20  # about one file of the tokenizer


def _bundle_files(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding for each listed file that a bundle may not contain."""
    for entry in signed.manifest.files:
        if not allowed_in_bundle(entry.name):
            yield f"a bundle may not hold {entry.name}"


def _bundle_settings(signed: SignedFolder) -> Iterator[str]:
    """Check that the bundle's JSON files have only permitted keys and values."""
    listed = {entry.name for entry in signed.manifest.files}
    for name in sorted(listed & set(ALLOWED_KEYS)):
        yield from content_problems(name, read_json(signed, name))


def _bundle_config(signed: SignedFolder) -> Iterator[str]:
    """Check the bundle's config against its family, and against the number of all blocks in the manifest."""
    manifest, family = _bundle_of(signed)
    config = read_json(signed, CONFIG)
    if not isinstance(config, dict):
        yield f"{CONFIG} is not a JSON object"
        return
    config = _settings_of(signed)[0]
    yield from config_problems(config, family)
    if config.get("model_type") != family.model_type or config.get("architectures") != [family.class_name]:
        found = f"{config.get('model_type')!r}, {config.get('architectures')!r}"
        yield f"{CONFIG} names the model {found[:120]}, expected {family.model_type!r}, {[family.class_name]!r}"
    counts = {key: config[key] for key in family.count_keys if key in config}
    if (family.count_keys and not counts) or any(
        type(count) is not int or count != manifest.split.blocks for count in counts.values()
    ):
        yield f"{CONFIG} has block counts {str(counts)[:120]}, the split has {manifest.split.blocks}"
    for key in family.per_block:
        entries = config.get(key)
        if not isinstance(entries, list) or len(entries) != manifest.split.blocks:
            expected = f"expected one entry for each of {manifest.split.blocks} blocks"
            yield f"{CONFIG} has {key} = {str(entries)[:60]}, {expected}"
    for key in family.listed:
        if not _lists_blocks(config.get(key), manifest.split.blocks):
            found = str(config.get(key))[:60]
            yield f"{CONFIG} has {key} = {found}, expected a list of some of {manifest.split.blocks} blocks, in order"
    for key, value in family.fixed_settings.items():
        if config.get(key) != value:
            yield f"{CONFIG} has {key} = {str(config.get(key))[:60]!r}, by which blocks go by place, expected {value}"
    yield from (f"{CONFIG}: {stray}" for stray in family.strays(config))
    if family.layouts:
        yield from (f"{CONFIG} has {problem}" for problem in declared_config_problems(config, family))
    for key, value in family.set_switches(config).items():
        yield f"{CONFIG} has {key} = {str(value)[:60]!r}, under which blocks cannot be cut"


def _bundle_values(signed: SignedFolder) -> Iterator[str]:
    """Check that each config value is of the kind that its key asks for, and no larger than a model needs."""
    _, family = _bundle_of(signed)
    yield from (f"{CONFIG} has {problem}" for problem in value_problems(_settings_of(signed)[0], family))


def _bundle_tokenizer_parts(signed: SignedFolder) -> Iterator[str]:
    """Check the tokenizer's vocabulary, its parts and its regular expressions, and the size of the chat template."""
    checks = {TOKENIZER: tokenizer_problems, VOCABULARY: vocabulary_problems}
    for entry in signed.manifest.files:
        if entry.name in checks:
            content = read_json(signed, entry.name, TOKENIZER_BYTES)
            yield from itertools.islice((f"{entry.name}: {one}" for one in checks[entry.name](content)), _MOST_FINDINGS)
        elif entry.name == CHAT_TEMPLATE and len(signed.read(entry.name)) > _TEMPLATE_BYTES:
            yield f"{entry.name} has {len(signed.read(entry.name))} bytes, expected at most {_TEMPLATE_BYTES}"


def _lists_blocks(found: object, count: int) -> bool:
    """Whether the config value `found` is a list of block indices from 0 to `count` - 1, ascending, each once."""
    if not isinstance(found, list) or any(type(block) is not int or not 0 <= block < count for block in found):
        return False
    return found == sorted(set(found))


def _bundle_weights(signed: SignedFolder) -> Iterator[str]:
    """Check that the weights have exactly the names, shapes and dtypes that follow from the config."""
    manifest, family = _bundle_of(signed)
    checkpoint = _open_listed(signed)
    settings, declared = _settings_of(signed)
    held = len(checkpoint.tensors)
    expected = set(family.outer_tensors(settings))
    for block in range(manifest.split.blocks):
        if not declared or not 0 <= block - declared.first < declared.blocks:
            expected |= {family.in_block(block, path) for path in family.block_tensors(settings, block)}
        if len(expected) > 2 * held + 1000:  # a small file with a hostile config must not cost much memory and time
            yield f"weights: {held} tensors, the config makes it over {len(expected)}"
            return
    try:
        ours = _declared_tensors(declared, manifest, family, checkpoint, settings) if declared else {}
    except (ValueError, IncompatibleError) as misfit:
        yield f"{CONFIG}: {misfit}"
        return
    yield from names_differ("weights", set(checkpoint.tensors), expected | ours.keys())
    alike: dict[str, TensorRange] = {}  # the first tensor of each path in a block; all experts count as one path
    for name, tensor in checkpoint.tensors.items():
        if name in ours:
            shape, dtypes = ours[name]
            if tensor.shape != shape or tensor.dtype not in dtypes:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                yield f"{name[:120]!r} is {found}, what is declared makes it {' or '.join(dtypes)} {list(shape)}"
            continue
        problem = family.shape_problem(name, tensor.shape, settings)
        if problem:
            yield problem
        place = family.block_of(name) if not family.layouts else None
        twin = alike.setdefault(family.pattern_of(place[1]), tensor) if place else tensor
        if tensor.shape != twin.shape:
            yield f"{name[:120]!r} has shape {list(tensor.shape)}, others of its kind have {list(twin.shape)}"
        if tensor.dtype not in FLOATS:
            yield f"{name[:120]!r} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"


def _declared_tensors(
    declared: Declared, manifest: BundleManifest, family: Architecture, checkpoint: Checkpoint, settings: dict[str, Any]
) -> dict[str, Expected]:
    """The expected shape and dtypes of each tensor in the emulator's blocks, if modules are declared, by full name.

    They follow from the shapes of the family's blocks; {} if those are missing or wrong, which other rules report.
    `checkpoint` has the tensors in the files, and `settings` is the family's config.

    Raises:
        ValueError: the declared numbers of heads, neurons or experts do not fit the family's blocks, or imply far more
            tensors than there are.
        IncompatibleError: the config does not say how many heads a block has.
    """
    found: dict[str, Expected] = {}
    for place, shapes in _family_shapes(declared, manifest, family, checkpoint, settings):
        tensors = declared.tensors(family, settings, shapes, place)
        found |= {family.in_block(declared.first + place, path): expected for path, expected in tensors.items()}
        if len(found) > 2 * len(checkpoint.tensors) + 1000:
            raise ValueError(f"it declares over {len(found)} tensors, the weights have {len(checkpoint.tensors)}")
    return found


def _family_shapes(
    declared: Declared, manifest: BundleManifest, family: Architecture, checkpoint: Checkpoint, settings: dict[str, Any]
) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
    """Yield each emulator block that has weights, with the shapes of the tensors that it has in the family.

    A block is given by its index in the emulator, a shape by the path in the block. The shapes are those of the first
    uncompressed block with such a tensor; if none has it, they are declared. Yields nothing if a shape is missing or
    wrong, which other rules report.
    """
    found: dict[str, tuple[int, ...]] = dict(declared.shapes or {})
    for block in reversed(family.kinds_of_blocks(settings, manifest.split.verbatim)):
        names = {path: family.in_block(block, path) for path in family.block_tensors(settings, block)}
        found |= {path: checkpoint.tensors[name].shape for path, name in names.items() if name in checkpoint.tensors}
    places = range(min(declared.blocks, manifest.split.emulator))
    kinds = {
        family.has_experts(settings, block): family.block_tensors(settings, block)
        for block in family.kinds_of_blocks(settings, (declared.first + place for place in places))
    }
    if any(not paths <= found.keys() for paths in kinds.values()) or any(
        len(found.get(f"{path}.weight", (0, 0))) != 2 for path in family.linears
    ):
        return
    shapes = {kind: {path: found[path] for path in paths} for kind, paths in kinds.items()}
    for place in places:
        if declared.holds_weights(place):
            yield place, shapes[family.has_experts(settings, declared.first + place)]


def _undetermined(
    declared: Declared, manifest: BundleManifest, family: Architecture, settings: dict[str, Any]
) -> set[str]:
    """The paths in a block of the emulator's tensors that no uncompressed block of the bundle has."""
    places = range(declared.first, declared.first + min(declared.blocks, manifest.split.emulator))
    ours, theirs = (
        {path for index in family.kinds_of_blocks(settings, blocks) for path in family.block_tensors(settings, index)}
        for blocks in (places, manifest.split.verbatim)
    )
    return ours - theirs


def _bundle_family_shapes(signed: SignedFolder) -> Iterator[str]:
    """Check the shapes that the config declares for tensors that no uncompressed block of the bundle has."""
    manifest, family = _bundle_of(signed)
    settings, declared = _settings_of(signed)
    if declared is None:
        return
    paths = _undetermined(declared, manifest, family, settings)
    if (declared.shapes is None) == bool(paths):
        only = "which only a bundle without a block of the family has" if declared.shapes else "and no block has them"
        yield f"{CONFIG} declares {'' if declared.shapes else 'no '}shapes of the family's blocks, {only}"
    if declared.shapes is None or not paths:
        return
    yield from names_differ("shapes of the family's blocks", set(declared.shapes), paths)
    for path, shape in declared.shapes.items():
        problem = family.shape_problem(family.in_block(0, path), shape, settings) if path in paths else None
        if problem:
            yield f"{CONFIG}: {problem}"


def _bundle_declared(signed: SignedFolder) -> Iterator[str]:
    """Check that the declared modules of the emulator fit its family, the split and the manifest's `requires`."""
    manifest, family = _bundle_of(signed)
    config = read_json(signed, CONFIG)
    try:
        _, declared = unwrapped(config if isinstance(config, dict) else {})
    except ValueError as problem:
        yield f"{CONFIG}: {problem}"
        return
    features = (*(declared.features if declared else ()), *manifest.features)
    if manifest.requires != features:
        yield f"the manifest requires {list(manifest.requires)}, {CONFIG} and split declare {list(features)}"
    if declared and manifest.split.spread:
        yield f"{CONFIG} declares modules, which is not possible with trained blocks inside the emulator"
    if declared and (declared.first, declared.blocks) != (manifest.split.bottom, manifest.split.emulator):
        yield f"{CONFIG} declares {declared.blocks} blocks from {declared.first} on, which is not the split's emulator"
    for part, why in obstacles(family, _settings_of(signed)[0], family.norms).items() if declared else ():
        if getattr(declared, part) is not None:
            yield f"{CONFIG} declares {part} for blocks from which none can be removed: {why}"
    if declared and (family.layouts or (family.experts and not OF_MIXTURES.issuperset(declared.features))):
        kind = "a mixture of experts" if family.experts else "a declared family"
        yield f"{CONFIG} declares modules that {kind} cannot have"
    ours = {entry.name.startswith("offsite-") for entry in manifest.files if is_weights(entry.name)}
    if ours != {declared is not None}:
        yield "the weights' file has the name of the other kind of model"


def _bundle_returnable(signed: SignedFolder) -> Iterator[str]:
    """Check that the tensors and LoRA targets that may be returned are those of the trained blocks and the head."""
    manifest, family = _bundle_of(signed)
    checkpoint = _open_listed(signed)
    blocks = frozenset(manifest.split.trained)
    trained = {
        n
        for n in checkpoint.tensors
        if (p := family.block_of(n)) and p[0] in blocks and p[1] not in family.layout(p[0]).buffers
    }
    if manifest.split.adapted:
        trained = {name for name in trained if family.is_bias(name)}
    yield from names_differ("tensors that may come back", set(manifest.tensors), trained)
    head = set(family.head_tensors(_settings_of(signed)[0])) if manifest.head else set()
    yield from names_differ("the head that may come back", set(manifest.head), head)
    yield from entries_differ({**manifest.tensors, **manifest.head}, checkpoint.tensors)
    settings, declared = _settings_of(signed)
    emulated = _emulated_shapes(declared, manifest, family, checkpoint, settings) if declared else {}
    for target, (inputs, outputs) in manifest.lora_targets.items():
        place = family.linear_layer_of(target)
        if place and place[1] not in family.lora_linears_of(settings, place[0]):
            yield f"LoRA target {target}: pairs there have no effect under this config"
        weight = checkpoint.tensors.get(f"{family.in_block(*place)}.weight") if place else None
        found = weight.shape if weight else None
        if place and declared and place[0] in manifest.split.adapted:
            found = emulated.get(place[0], {}).get(f"{place[1]}.weight")
        shape = (inputs, outputs) if family.transposed else (outputs, inputs)
        if found != shape:
            yield f"LoRA target {target}: the weight's shape is {found or 'no such weight'}, expected {shape}"


def _emulated_shapes(
    declared: Declared, manifest: BundleManifest, family: Architecture, checkpoint: Checkpoint, settings: dict[str, Any]
) -> dict[int, dict[str, tuple[int, ...]]]:
    """The shapes of emulator blocks with adapters, before matrices are quantised, factored or made sparse.

    The keys are a block's index in the bundle, then the path in the block; {} if another rule has a finding.
    """
    adapted = set(manifest.split.adapted)
    try:
        return {
            declared.first + place: declared.narrowed(family, settings, shapes, place)
            for place, shapes in _family_shapes(declared, manifest, family, checkpoint, settings)
            if declared.first + place in adapted
        }
    except (ValueError, IncompatibleError):
        return {}


def _bundle_tokenizer(signed: SignedFolder) -> Iterator[str]:
    """Check the tokenizer's digest in the manifest."""
    manifest, _ = _bundle_of(signed)
    if tokenizer_digest(manifest.files) != manifest.tokenizer:
        yield "the tokenizer's files do not give the tokenizer digest of the manifest"


BUNDLE_RULES: tuple[Rule, ...] = (
    _bundle_files,
    _bundle_settings,
    _bundle_config,
    _bundle_values,
    _bundle_declared,
    _bundle_family_shapes,
    _bundle_weights,
    _bundle_returnable,
    _bundle_tokenizer_parts,
    _bundle_tokenizer,
)


def _bundle_of(signed: SignedFolder) -> tuple[BundleManifest, Architecture]:
    """The bundle's manifest and its family; TypeError for another artifact."""
    if not isinstance(signed.manifest, BundleManifest):
        raise TypeError("a rule for bundles was run on something else")
    return signed.manifest, signed.manifest.family


def _settings_of(signed: SignedFolder) -> tuple[dict[str, Any], Declared | None]:
    """The family's config, and the declaration of the emulator's modules (None if there is none).

    A malformed config gives ({}, None); `_bundle_declared` reports it.
    """
    config = read_json(signed, CONFIG)
    try:
        return unwrapped(config if isinstance(config, dict) else {})
    except ValueError:
        return {}, None


def _open_listed(signed: SignedFolder) -> Checkpoint:
    """Open the checkpoint that the listed weight files make up.

    Raises:
        VerificationError: it is ambiguous which files a reader would load, or a listed file belongs to no checkpoint.
    """
    weights = [entry.name for entry in signed.manifest.files if is_weights(entry.name)]
    ways = {WEIGHTS, INDEX, DECLARED_WEIGHTS, DECLARED_INDEX} & set(weights)
    if len(ways) > 1:
        both = " and ".join(sorted(ways))
        raise VerificationError(f"it holds both {both}, of which another reader may take the other")
    for name in weights:
        signed.file(name)
    checkpoint = checkpoint_of(signed)
    used = {tensor.file.name for tensor in checkpoint.tensors.values()}
    listed = set(weights) - {INDEX, DECLARED_INDEX}
    if used != listed:
        raise VerificationError(f"the weights' files are {sorted(listed)}, the index uses {sorted(used)}")
    return checkpoint
