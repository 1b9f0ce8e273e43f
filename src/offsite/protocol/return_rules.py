"""Rules for a return: exactly the permitted tensors, finite values, signed by the recipient of the bundle."""

import json
from collections.abc import Iterator

from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.contents import (
    ADAPTER_CONFIG,
    CLASSIFIER,
    WEIGHTS_OF,
    checkpoint_file,
)
from offsite.protocol.manifest import (
    BundleManifest,
    ReturnManifest,
    TensorEntry,
)
from offsite.protocol.output_head import returned_head, returned_name
from offsite.protocol.peft_adapter import adapter_config, adapter_tensors, lora_pair
from offsite.protocol.signed_folder import (
    Rule,
    SignedFolder,
    entries_differ,
    manifest_tensors_differ,
    names_differ,
    read_json,
)


def _return_files(signed: SignedFolder) -> Iterator[str]:
    """Check that the manifest lists exactly the files of its method, checkpoints and classifier."""
    manifest = _return_of(signed)
    checkpoints = {checkpoint_file(number) for number in range(1, manifest.checkpoints)}
    expected = {WEIGHTS_OF[manifest.method], *((ADAPTER_CONFIG,) if manifest.lora else ()), *checkpoints}
    expected |= {CLASSIFIER} if manifest.classes else set()
    yield from names_differ("files", {entry.name for entry in manifest.files}, expected)


def _return_tensors(signed: SignedFolder) -> Iterator[str]:
    """Check that each tensor file has exactly the tensors in the manifest, all in F32."""
    manifest = _return_of(signed)
    for file in _returned_files(manifest):
        where = "the file" if file == WEIGHTS_OF[manifest.method] else file
        held = signed.header(file)
        yield from names_differ(f"tensors in {where}", set(held), set(manifest.tensors))
        yield from entries_differ(manifest.tensors, held, where)
        wrong = {name: tensor.dtype for name, tensor in held.items() if tensor.dtype != "F32"}
        yield from (f"{name[:120]!r} has dtype {dtype} in {where}, expected F32" for name, dtype in wrong.items())


def _return_finite(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding for each tensor with NaN or infinity."""
    for file in _returned_files(_return_of(signed)):
        for name in signed.file(file).not_finite:
            yield f"{name[:120]!r} holds NaN or infinity in {file}"


def _return_lora(signed: SignedFolder) -> Iterator[str]:
    """Check the targets, tensors and adapter_config.json of a LoRA return."""
    manifest = _return_of(signed)
    lora, parent = manifest.lora, signed.parent
    if lora is None:
        return
    if len(set(lora.targets)) != len(lora.targets):
        yield "a LoRA target is named twice"
    strange = sorted(set(lora.targets) - set(parent.lora_targets)) if parent else []
    yield from (f"LoRA sits on {name}, which the bundle does not permit" for name in strange)
    families = [parent.family] if parent else ARCHITECTURES.values()
    if parent is None:  # without the bundle the expected shapes are unknown
        names = {name for target in lora.targets for name in lora_pair(target)}
        heads = {
            returned_name(f"head.{kind}", family, "lora")
            for family in families
            for kind in ("weight", "bias")
            if family.head
        }
        names |= heads & manifest.tensors.keys() if manifest.head else set()
        yield from names_differ("tensors", set(manifest.tensors), names)
    elif not strange:
        yield from manifest_tensors_differ(
            manifest.tensors, adapter_tensors(lora, parent.lora_targets) | _head_of(manifest, parent)
        )
    held = read_json(signed, ADAPTER_CONFIG)
    configs = [adapter_config(lora, family, head=manifest.head) for family in families]
    # compared as JSON text, because in Python 1 equals True
    if json.dumps(held, sort_keys=True) not in [json.dumps(config, sort_keys=True) for config in configs]:
        yield f"{ADAPTER_CONFIG} is not the one that these LoRA settings give"


def _return_own(signed: SignedFolder) -> Iterator[str]:
    """Check that a return by full or bitfit has exactly the tensors that the bundle permits."""
    manifest = _return_of(signed)
    if manifest.method in ("full", "bitfit") and signed.parent is not None:
        own = signed.parent.own_tensors(manifest.method)
        expected = {n: TensorEntry(shape=e.shape, dtype="F32") for n, e in own.items()}
        yield from manifest_tensors_differ(manifest.tensors, expected | _head_of(manifest, signed.parent))


def _return_head(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding if the head was tuned without permission; the rules for each method check the head's tensors."""
    if _return_of(signed).head and signed.parent is not None and not signed.parent.head:
        yield "the head was tuned, which the bundle does not permit"


def _return_bottleneck(signed: SignedFolder) -> Iterator[str]:
    """Check that a return of bottlenecks has exactly the bottlenecks' tensors."""
    manifest = _return_of(signed)
    if manifest.bottleneck and signed.parent is not None:
        yield from manifest_tensors_differ(manifest.tensors, manifest.bottleneck.tensors(signed.parent))


def _return_classifier(signed: SignedFolder) -> Iterator[str]:
    """Check that only a return for an image encoder has a classifier, with an output for each class, finite, in F32."""
    classes, parent = _return_of(signed).classes, signed.parent
    inputs = classifier_inputs(parent) if parent else None
    if parent is not None and (inputs is None) != (classes is None):
        yield "a classifier comes back" if classes else "no classifier comes back, which an image encoder needs"
    if classes is None:
        return
    held = signed.header(CLASSIFIER)
    yield from names_differ("classifier", set(held), {"classifier.weight", "classifier.bias"})
    for name, tensor in held.items():
        width = tensor.shape[-1] if inputs is None and tensor.shape else inputs
        expected = (len(classes), width) if name.endswith("weight") else (len(classes),)
        if tensor.dtype != "F32" or tensor.shape != expected:
            yield f"{name[:120]!r} is {tensor.dtype} {list(tensor.shape)}, expected F32 {list(expected)}"
        elif name in signed.file(CLASSIFIER).not_finite:
            yield f"{name[:120]!r} holds NaN or infinity"


def classifier_inputs(bundle: BundleManifest) -> int | None:
    """The number of inputs of the classifier (features of one image); None if the bundle is of a language model."""
    family = bundle.family
    if family.vision is None:
        return None
    places = ((family.linear_layer_of(name), shape) for name, shape in bundle.lora_targets.items())
    hidden = next((shape[1] for place, shape in places if place and place[1] == family.mlp_out), 0)
    return hidden * len(family.vision.features)


def _return_parties(signed: SignedFolder) -> Iterator[str]:
    """Check that the bundle's recipient signed the return and addressed it to the bundle's issuer."""
    manifest = _return_of(signed)
    if signed.parent is None:
        return
    if manifest.signer != signed.parent.recipient:
        yield "signed by another party than the one that the bundle was issued to"
    if manifest.recipient != signed.parent.issuer:
        yield "addressed to another party than the one that issued the bundle"


RETURN_RULES: tuple[Rule, ...] = (
    _return_files,
    _return_tensors,
    _return_finite,
    _return_lora,
    _return_own,
    _return_head,
    _return_bottleneck,
    _return_classifier,
    _return_parties,
)


def _head_of(manifest: ReturnManifest, parent: BundleManifest) -> dict[str, TensorEntry]:
    """The head's tensors that the return must contain; empty if the head was not tuned."""
    return returned_head(parent, manifest.method) if manifest.head else {}


def _returned_files(manifest: ReturnManifest) -> list[str]:
    """The tensor files of a return: that of the last checkpoint, then those of earlier ones that the manifest lists."""
    listed = {entry.name for entry in manifest.files}
    earlier = [checkpoint_file(number) for number in range(1, manifest.checkpoints)]
    return [
        WEIGHTS_OF[manifest.method],
        *(name for name in earlier if name in listed),
    ]  # `_return_files` reports the others


def _return_of(signed: SignedFolder) -> ReturnManifest:
    """The return's manifest; TypeError for another artifact."""
    if not isinstance(signed.manifest, ReturnManifest):
        raise TypeError("a rule for returns was run on something else")
    return signed.manifest


def beyond_policy(manifest: ReturnManifest, bundle: BundleManifest) -> list[str]:
    """A message for each setting of a valid return (method, rank, width) that its bundle does not permit."""
    reasons = []
    if manifest.method not in bundle.methods:
        reasons.append(f"tuned by {manifest.method}, the bundle permits {', '.join(bundle.methods)}")
    if manifest.lora and manifest.lora.rank > bundle.max_rank:
        reasons.append(f"LoRA of rank {manifest.lora.rank}, the bundle permits up to {bundle.max_rank}")
    if manifest.bottleneck and manifest.bottleneck.width > bundle.max_width:
        reasons.append(f"bottlenecks of width {manifest.bottleneck.width}, the bundle permits up to {bundle.max_width}")
    return reasons
