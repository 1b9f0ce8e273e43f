"""Computes the content of a return from the settings and the bundle's manifest: tensors, files, manifest.

Torch-free, so that a plan can use it before any model is loaded.
"""

import json
from collections.abc import Mapping, Sequence

from offsite.config import TuneSpec
from offsite.protocol.artifacts import Bundle
from offsite.protocol.contents import ADAPTER_CONFIG, CLASSIFIER, WEIGHTS_OF, checkpoint_file
from offsite.protocol.manifest import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    BottleneckSettings,
    BundleManifest,
    FileEntry,
    LoraSettings,
    ReturnManifest,
    TensorEntry,
    render_manifest,
)
from offsite.protocol.output_head import returned_head
from offsite.protocol.peft_adapter import adapter_config, adapter_tensors
from offsite.protocol.return_rules import classifier_inputs
from offsite.protocol.signing import SIGNATURE_BYTES
from offsite.storage.safetensors_files import NewTensor, safetensors_bytes

_SCORE = 1 / 3  # a loss with as many digits as most, to predict the size of the manifest


def lora_settings(manifest: BundleManifest, spec: TuneSpec) -> LoraSettings:
    """The LoRA settings that a return declares: every permitted target layer; alpha is twice the rank by default."""
    rank, alpha = spec.adapter.rank, spec.adapter.lora_alpha
    return LoraSettings(
        rank=rank, alpha=float(2 * rank if alpha is None else alpha), targets=tuple(sorted(manifest.lora_targets))
    )


def returned_tensors(manifest: BundleManifest, spec: TuneSpec) -> dict[str, TensorEntry]:
    """The tensors of a return with these settings, by name: all trained tensors except an image classifier's."""
    method = spec.adapter.method
    if method == "bottleneck":
        return BottleneckSettings(width=spec.adapter.width).tensors(manifest)
    head = returned_head(manifest, method) if spec.adapter.tune_head else {}
    if method != "lora":
        own = {
            name: TensorEntry(shape=entry.shape, dtype="F32") for name, entry in manifest.own_tensors(method).items()
        }
        return own | head
    return adapter_tensors(lora_settings(manifest, spec), manifest.lora_targets) | head


def classifier_shapes(manifest: BundleManifest, classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the returned classifier's tensors, by name; empty for a language model.

    Args:
        manifest: the bundle's manifest.
        classes: the number of classes.
    """
    inputs = classifier_inputs(manifest)
    return {} if inputs is None else {"classifier.weight": (classes, inputs), "classifier.bias": (classes,)}


def adapter_settings(manifest: BundleManifest, spec: TuneSpec) -> bytes:
    """The content of `adapter_config.json` in a LoRA return."""
    family = manifest.family
    config = adapter_config(lora_settings(manifest, spec), family, head=spec.adapter.tune_head)
    return json.dumps(config, indent=1).encode() + b"\n"


def return_manifest(
    bundle: Bundle,
    spec: TuneSpec,
    signer: str,
    files: tuple[FileEntry, ...],
    *,
    classes: tuple[str, ...] | None,
    scores: tuple[float, ...] | None,
) -> ReturnManifest:
    """Make the manifest of a return with these files.

    Args:
        bundle: the bundle that was tuned.
        spec: the settings of the tuning.
        signer: the data owner's key, 64 hex digits.
        files: the return's files.
        classes: the names of the classifier's classes; None if there is no classifier.
        scores: the held-out loss of each checkpoint; None if losses are not reported.
    """
    method = spec.adapter.method
    return ReturnManifest(
        format=FORMAT,
        requires=(),
        files=files,
        kind="return",
        bundle=bundle.digest,
        signer=signer,
        recipient=bundle.manifest.issuer,
        method=method,
        lora=lora_settings(bundle.manifest, spec) if method == "lora" else None,
        bottleneck=BottleneckSettings(width=spec.adapter.width) if method == "bottleneck" else None,
        classes=classes,
        head=spec.adapter.tune_head,
        earlier_checkpoints=spec.points.checkpoints - 1,
        scores=scores,
        tensors=returned_tensors(bundle.manifest, spec),
    )


def return_sizes(bundle: Bundle, spec: TuneSpec, signer: str, classes: Sequence[str] | None) -> dict[str, int]:
    """The size of every file of the return in bytes. With scores, the manifest's size may differ by a few digits.

    Args:
        bundle: the bundle that will be tuned.
        spec: the settings of the tuning.
        signer: the data owner's key, 64 hex digits.
        classes: the names of the classifier's classes; None if there is no classifier.
    """
    shapes = {name: entry.shape for name, entry in sorted(returned_tensors(bundle.manifest, spec).items())}
    count = spec.points.checkpoints
    names = (WEIGHTS_OF[spec.adapter.method], *(checkpoint_file(number) for number in range(1, count)))
    sizes = dict.fromkeys(names, _fp32_file(shapes))
    if classes:
        sizes[CLASSIFIER] = _fp32_file(classifier_shapes(bundle.manifest, len(classes)))
    if spec.adapter.method == "lora":
        sizes[ADAPTER_CONFIG] = len(adapter_settings(bundle.manifest, spec))
    entries = tuple(FileEntry(name=name, size=size, sha256="0" * 64) for name, size in sorted(sizes.items()))
    scores = (_SCORE,) * count if spec.points.report_scores else None
    named = tuple(classes) if classes else None
    manifest = return_manifest(bundle, spec, signer, entries, classes=named, scores=scores)
    return sizes | {MANIFEST: len(render_manifest(manifest)), SIGNATURE: SIGNATURE_BYTES}


def _fp32_file(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size in bytes of a safetensors file with fp32 tensors of these shapes."""
    return safetensors_bytes([NewTensor(name, "F32", shape, lambda: ()) for name, shape in shapes.items()])
