"""Plugging in: a verified return is put into the base model. Tensors move by name; no model is built, torch-free."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from offsite.config import PlugInSpec
from offsite.core.checkpoint import (
    NewTensor,
    TensorRange,
    copied,
    from_float32,
    open_checkpoint,
    read_float32,
    read_header,
    to_float32,
    write_checkpoint,
    write_safetensors,
)
from offsite.core.family import Vision
from offsite.core.progress import Event, Progress, silent
from offsite.core.storage import Written, require_free, staged_folder, write_stream
from offsite.errors import IncompatibleError, PolicyError, UsageError, VerificationError
from offsite.exchange.artifacts import Base, PlugIn, Return
from offsite.exchange.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BOTTLENECK_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    PROCESSOR,
    RETURNED_WEIGHTS,
    TOKENIZER_FILES,
)
from offsite.exchange.home import Home
from offsite.exchange.lora_folder import adapter_config, lora_pair
from offsite.exchange.manifest import FORMAT, LoraSettings, PlugInManifest
from offsite.exchange.pack import file_entries, seal
from offsite.model_owner.base_model import BaseModel, by_todays_names, fingerprint, open_base
from offsite.model_owner.classifier import classifier_config, classifier_tensors
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Issued, Ledger

# What a merged plug-in takes over from the base beside its weights.
_COMPANIONS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, "added_tokens.json", "LICENSE", "LICENSE.txt")

Change = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def plug_in(base: Base, returned: Path, out: Path, spec: PlugInSpec, home: Home, progress: Progress = silent) -> PlugIn:
    """Put a return into the base model it was made for.

    Args:
        base: the owner's full model, the one that the bundle was packed from; it is only read.
        returned: the return's folder; it is verified first, and the verdict is recorded.
        out: an adapter folder, for LoRA one for `PeftModel.from_pretrained(base, out)`; or a complete checkpoint.
        spec: the form, and whether a return may be plugged in again.
        home: the owner's.
        progress: where the events go.

    Raises:
        VerificationError: the return fails verification.
        PolicyError: it goes beyond what was permitted, or was plugged in before.
        IncompatibleError: the base is another one than the bundle's.
        UsageError: the return's method has no such form, or `out` holds something.
    """
    require_free(out)
    progress(Event("verifying the return", 0))
    verified, parent = intake(returned, home)
    form = form_of(verified, spec)
    _check_again(verified, spec, home)
    model = open_base(base)
    progress(Event("comparing the base with the ledger", 0))
    if fingerprint(model, home.identity()) != parent.manifest.base:
        raise IncompatibleError(
            f"{base.folder} is not the base that this bundle was packed from",
            reasons=["its fingerprint differs from the ledger's"],
            next_step="name the folder that `offsite pack` was given for this bundle",
        )
    progress(Event("writing the plug-in", 0))
    # the ledger's entry is made before the folder appears, and kept once it has
    with ExitStack() as entry, staged_folder(out) as folder:
        write = _write_adapter if form == "adapter" else _write_merged
        with _refusals_recorded(verified, home):
            written = write(model, verified, parent, folder, np.float32(spec.strength))
        manifest = PlugInManifest(
            kind="plug-in",
            format=FORMAT,
            requires=(),
            form=form,
            architecture=model.row.model_type,
            base=parent.manifest.base,
            bundle=parent.digest,
            returned=verified.digest,
            strength=spec.strength,
            issuer=home.identity().public_key.hex,
            files=file_entries(written),
        )
        made = PlugIn(out, manifest, seal(folder, manifest, home.identity()))
        entry.enter_context(Ledger(home.ledger).recording_plug_in(made))
    return made


@contextmanager
def _refusals_recorded(verified: Return, home: Home) -> Iterator[None]:
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


def _check_again(verified: Return, spec: PlugInSpec, home: Home) -> None:
    ledger = Ledger(home.ledger)
    before = ledger.plugged_in(verified)
    if before and not spec.again:
        reason = f"plugged in at {', '.join(before)}"
        ledger.record_intake(verified.digest, verified.manifest.bundle, [reason])
        raise PolicyError(
            f"{verified.folder} was plugged in before",
            reasons=[reason],
            next_step="if a second plug-in is meant, say so with --again",
        )


def _to_base(name: str, model: BaseModel, parent: Issued, *, target: bool = False) -> str:
    """The base's name in files of a tensor, or of a target of LoRA, of the bundle: the block's index is mapped back."""
    place = model.row.map_of(name) if target else model.row.block_of(name)
    if place is None:
        raise IncompatibleError(f"{name[:200]} belongs to no block")
    return model.row.in_block(parent.kept[place[0]], place[1])


def _write_adapter(
    model: BaseModel, verified: Return, parent: Issued, folder: Path, strength: np.float32
) -> list[Written]:
    if verified.manifest.bottleneck:
        return [_write_bottlenecks(model, verified, parent, folder, strength)]
    lora = _lora_of(verified)
    held = read_header(verified.folder / ADAPTER_WEIGHTS)
    renamed = []
    for target in lora.targets:
        base_target = _to_base(target, model, parent, target=True)
        (a, b), (new_a, new_b) = lora_pair(target), lora_pair(base_target)
        renamed += [copied(held[a], name=new_a), _scaled(held[b], new_b, strength)]
    targets = tuple(_to_base(target, model, parent, target=True) for target in lora.targets)
    config = adapter_config(lora.model_copy(update={"targets": targets}), model.row)
    return [
        write_safetensors(folder / ADAPTER_WEIGHTS, renamed),
        write_stream(folder / ADAPTER_CONFIG, [json.dumps(config, indent=1).encode() + b"\n"]),
    ]


def _write_bottlenecks(
    model: BaseModel, verified: Return, parent: Issued, folder: Path, strength: np.float32
) -> Written:
    held = read_header(verified.folder / BOTTLENECK_WEIGHTS)
    renamed = []
    for name, tensor in held.items():
        factor = strength if ".bottleneck.up." in name else np.float32(1)
        renamed.append(_scaled(tensor, _to_base(name, model, parent), factor))
    return write_safetensors(folder / BOTTLENECK_WEIGHTS, renamed)


def _write_merged(
    model: BaseModel, verified: Return, parent: Issued, folder: Path, strength: np.float32
) -> list[Written]:
    changes = (_lora_changes if verified.manifest.lora else _own_changes)(model, verified, parent)
    if model.row.vision is not None:
        return _write_classifier(model, model.row.vision, verified, changes, folder, strength)
    tensors = []
    for stored in open_checkpoint(model.folder).tensors.values():
        parts = by_todays_names(model.row, stored)
        new = [
            _changed(part, changes[name], strength) if name in changes else copied(part) for name, part in parts.items()
        ]
        tensors.append(_joined(stored, new) if changes.keys() & parts.keys() else copied(stored))
    return write_checkpoint(folder, tensors) + _companions(model, folder, _COMPANIONS)


def _write_classifier(
    model: BaseModel,
    vision: Vision,
    verified: Return,
    changes: Mapping[str, Change],
    folder: Path,
    strength: np.float32,
) -> list[Written]:
    tuned = {name: _changed(model.tensors[name], change, strength) for name, change in changes.items()}
    written = write_checkpoint(folder, classifier_tensors(model, vision, tuned, verified))
    written.append(write_stream(folder / CONFIG, [classifier_config(model, vision, verified)]))
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


def _scaled(tensor: TensorRange, name: str, factor: np.float32) -> NewTensor:
    """A returned tensor under another name, multiplied in float32; by 1 it keeps its bits."""
    if factor == 1:
        return copied(tensor, name=name)

    def chunks() -> list[bytes]:
        with np.errstate(over="ignore"):  # judged below
            values = read_float32(tensor) * factor
        if not np.isfinite(values).all():
            raise VerificationError(
                "the return does not fit into F32 at this strength",
                reasons=[f"{tensor.name} times {factor} would hold infinity"],
                next_step="refuse the return; nothing was written",
            )
        return [from_float32(values, "F32").tobytes()]

    return NewTensor(name, "F32", tensor.shape, chunks)


def _changed(tensor: TensorRange, change: Change, strength: np.float32) -> NewTensor:
    """A base tensor plus so much of what the return changes, added in float32 and rounded once to the base's dtype."""

    def chunks() -> list[bytes]:
        values = read_float32(tensor)
        with np.errstate(over="ignore", invalid="ignore"):  # judged below, by what would be written
            delta = strength * change(values)
            # where nothing changed the base's bits stay, the sign of a zero included
            sums = from_float32(np.where(delta == 0, values, values + delta), tensor.dtype).tobytes()
        if not np.isfinite(to_float32(sums, tensor.dtype)).all():
            raise VerificationError(
                f"the return does not fit into {tensor.dtype}",
                reasons=[f"{tensor.name} would hold NaN or infinity, though every returned number is finite"],
                next_step="refuse the return; nothing was written",
            )
        return [sums]

    return NewTensor(tensor.name, tensor.dtype, tensor.shape, chunks)


def _lora_changes(model: BaseModel, verified: Return, parent: Issued) -> Mapping[str, Change]:
    lora = _lora_of(verified)
    held = read_header(verified.folder / ADAPTER_WEIGHTS)

    def change_of(target: str) -> Change:
        def change(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            a, b = (read_float32(held[name]) for name in lora_pair(target))  # (r, in), (out, r)
            delta = np.float32(lora.alpha / lora.rank) * (b @ a)  # (out, in)
            return delta.T if model.row.transposed else delta

        return change

    return {f"{_to_base(target, model, parent, target=True)}.weight": change_of(target) for target in lora.targets}


def _own_changes(model: BaseModel, verified: Return, parent: Issued) -> Mapping[str, Change]:
    held = read_header(verified.folder / RETURNED_WEIGHTS)

    def change_of(name: str) -> Change:
        shipped_as = parent.manifest.tensors[name].dtype

        def change(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            shipped = to_float32(from_float32(values, shipped_as).tobytes(), shipped_as).reshape(values.shape)
            return read_float32(held[name]) - shipped

        return change

    return {_to_base(name, model, parent): change_of(name) for name in verified.manifest.tensors}


def _lora_of(verified: Return) -> LoraSettings:
    if verified.manifest.lora is None:
        raise IncompatibleError("this return holds no LoRA")
    return verified.manifest.lora
