"""Plugging in: a verified return is put into the base model. Tensors move by name; no model is built, torch-free."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError, UsageError, VerificationError
from offsite.model_owner.base_model import BaseModel, by_todays_names, fingerprint, open_base, require_unchanged
from offsite.model_owner.image_classifier import classifier_config, classifier_tensors
from offsite.model_owner.intake import issued_bundle, require_taken_in
from offsite.model_owner.ledger import Issued, Ledger, plugged_in_before
from offsite.model_owner.plugged_tensors import Chosen, adapter_tensors, changed_tensors, to_base
from offsite.models.family import Vision
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, PlugIn, Return
from offsite.protocol.contents import (
    ADAPTER_CONFIG,
    BESIDE_A_MODEL,
    CONFIG,
    GENERATION_CONFIG,
    PROCESSOR,
    TOKENIZER_FILES,
    WEIGHTS_OF,
)
from offsite.protocol.home import Home
from offsite.protocol.manifest import FORMAT, PlugInManifest
from offsite.protocol.peft_adapter import adapter_config
from offsite.protocol.sealing import file_entries, seal
from offsite.storage.files import Written, require_free, staged_folder, write_stream
from offsite.storage.safetensors_files import (
    NewTensor,
    TensorRange,
    copied,
    open_checkpoint,
    write_checkpoint,
    write_safetensors,
)

# What a merged plug-in takes over from the base beside its weights.
_COMPANIONS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, *BESIDE_A_MODEL)


def plug_in(
    base: Base, returned: Return, out: Path, spec: PlugInSpec, home: Home, progress: Progress = silent
) -> PlugIn:
    """Put a return into the base model it was made for.

    Args:
        base: the owner's full model, the one that the bundle was packed from; it is only read.
        returned: what `intake` gave.
        out: an adapter folder, for LoRA one for `PeftModel.from_pretrained(base, out)`; or a complete checkpoint.
        spec: the form, and whether a return may be plugged in again.
        home: the owner's.
        progress: where the events go.

    Raises:
        VerificationError: the return does not fit into the base's dtype at this strength.
        PolicyError: it was plugged in before.
        IncompatibleError: the base is another one than the bundle's.
        UsageError: the return was not taken in by this home, its method has no such form, it has no such checkpoint,
            or `out` holds something.
    """
    require_free(out)
    model, parent = open_base_of(returned, base, spec, home, progress)
    form, strength = form_of(returned, spec), 1.0 if spec.strength is None else spec.strength
    chosen = Chosen(returned, parent, checkpoint_of(returned, spec), np.float32(strength))
    progress(Event("writing the plug-in", 0))
    # the ledger's entry is there before the folder appears, and taken back if it does not
    with ExitStack() as entry, staged_folder(out) as folder:
        write = write_adapter if form == "adapter" else _write_merged
        with refusals_recorded(returned, home):
            written = write(model, chosen, folder)
        require_unchanged(model)
        manifest = PlugInManifest(
            kind="plug-in",
            format=FORMAT,
            requires=(),
            form=form,
            architecture=model.family.model_type,
            base=parent.manifest.base,
            bundle=parent.digest,
            returned=returned.digest,
            strength=strength,
            checkpoint=chosen.checkpoint,
            issuer=home.identity().public_key.hex,
            files=file_entries(written),
        )
        plugged = seal(folder, manifest, home.identity(), out)
        entry.enter_context(Ledger(home.ledger).recording_plug_in(plugged, again=spec.again))
    return plugged


def open_base_of(
    returned: Return, base: Base, spec: PlugInSpec, home: Home, progress: Progress
) -> tuple[BaseModel, Issued]:
    """Open the base that a return was made for, and look its bundle up in the ledger.

    Raises:
        PolicyError: as `plug_in`.
        IncompatibleError: as `plug_in`.
        UsageError: the return was not taken in by this home, its method has no such form, or it has no such checkpoint.
    """
    require_taken_in(returned, home)
    parent = issued_bundle(returned, home)
    form_of(returned, spec)
    checkpoint_of(returned, spec)
    _check_again(returned, spec, home)
    model = open_base(base)
    progress(Event("comparing the base with the ledger", 0))
    if fingerprint(model, home.identity(), base) != parent.manifest.base:
        raise IncompatibleError(
            f"{base.folder} is not the base that this bundle was packed from",
            reasons=["its fingerprint differs from the ledger's"],
            next_step="name the folder that `offsite pack` was given for this bundle",
        )
    return model, parent


@contextmanager
def refusals_recorded(verified: Return, home: Home) -> Iterator[None]:
    """Enter a return that turns out not to fit while it is used as refused in the ledger."""
    try:
        yield
    except VerificationError as error:
        Ledger(home.ledger).record_intake(verified.digest, verified.manifest.bundle, error.reasons or (error.what,))
        raise


def form_of(verified: Return, spec: PlugInSpec) -> Literal["adapter", "merged"]:
    """The form of a plug-in: the one that was asked for, else the one that suits the return.

    Raises:
        UsageError: the return's method, or the classifier that it brings, has no such form.
    """
    method = verified.manifest.method
    if verified.manifest.classes is not None:
        if spec.as_ == "adapter":
            raise UsageError(
                "a return with a classifier becomes a complete checkpoint, since an adapter folder has no place for it",
                next_step="plug it in with --as merged",
            )
        return "merged"
    if method == "bottleneck" and spec.as_ == "merged":
        raise UsageError(
            "a bottleneck stands beside the base's weights and cannot be merged into them",
            next_step="plug it in with --as adapter",
        )
    if method in ("full", "bitfit") and spec.as_ == "adapter":
        raise UsageError(
            f"a {method} return holds the model's own tensors, which no adapter folder can carry",
            next_step="plug it in with --as merged",
        )
    return spec.as_ or ("adapter" if method in ("lora", "bottleneck") else "merged")


def checkpoint_of(verified: Return, spec: PlugInSpec) -> int:
    """The number of the checkpoint: the one that was asked for, else the last.

    Raises:
        UsageError: the return has no such checkpoint.
    """
    there = verified.manifest.checkpoints
    if spec.checkpoint is not None and spec.checkpoint > there:
        raise UsageError(
            f"{verified.folder} has no checkpoint {spec.checkpoint}",
            reasons=[f"it holds {there}, counted from 1; the last is what it holds under the usual name"],
            next_step=f"give --checkpoint from 1 to {there}, or leave it out for the last",
        )
    return spec.checkpoint or there


def _check_again(verified: Return, spec: PlugInSpec, home: Home) -> None:
    ledger = Ledger(home.ledger)
    before = ledger.plugged_in(verified)
    if before and not spec.again:
        refusal = plugged_in_before(before)
        ledger.record_intake(verified.digest, verified.manifest.bundle, refusal.reasons)
        raise refusal


def write_adapter(model: BaseModel, chosen: Chosen, folder: Path) -> list[Written]:
    """Write what makes a folder an adapter of the base, but for the manifest."""
    written = [write_safetensors(folder / WEIGHTS_OF[chosen.returned.manifest.method], adapter_tensors(model, chosen))]
    lora = chosen.returned.manifest.lora
    if lora:
        targets = tuple(to_base(target, model, chosen.parent, target=True) for target in lora.targets)
        config = adapter_config(
            lora.model_copy(update={"targets": targets}), model.family, head=chosen.returned.manifest.head
        )
        written.append(write_stream(folder / ADAPTER_CONFIG, [json.dumps(config, indent=1).encode() + b"\n"]))
    return written


def _write_merged(model: BaseModel, chosen: Chosen, folder: Path) -> list[Written]:
    changes = changed_tensors(model, chosen)
    if model.family.vision is not None:
        return _write_classifier(model, model.family.vision, chosen, changes, folder)
    tensors = []
    for stored in open_checkpoint(model.folder).tensors.values():
        parts = by_todays_names(model.family, stored)
        new = [changes.get(name) or copied(part) for name, part in parts.items()]
        tensors.append(_joined(stored, new) if changes.keys() & parts.keys() else copied(stored))
    return write_checkpoint(folder, tensors) + _companions(model, folder, _COMPANIONS)


def _write_classifier(
    model: BaseModel,
    vision: Vision,
    chosen: Chosen,
    tuned: Mapping[str, NewTensor],
    folder: Path,
) -> list[Written]:
    written = write_checkpoint(folder, classifier_tensors(model, vision, tuned, chosen.returned))
    written.append(
        write_stream(folder / CONFIG, [classifier_config(model, vision, chosen.returned.manifest.classes or ())])
    )
    return written + _companions(model, folder, (PROCESSOR, "LICENSE", "LICENSE.txt"))


def _companions(model: BaseModel, folder: Path, names: Sequence[str]) -> list[Written]:
    return [
        write_stream(folder / name, [(model.folder / name).read_bytes()])
        for name in names
        if (model.folder / name).is_file()
    ]


def _joined(stored: TensorRange, parts: Sequence[NewTensor]) -> NewTensor:
    """A tensor of the base's file from its parts: itself, or the matrices of stacked experts."""
    return NewTensor(
        stored.name, stored.dtype, stored.shape, lambda: chain.from_iterable(part.chunks() for part in parts)
    )
