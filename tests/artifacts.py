"""Bundles and returns made by hand, and what a hostile party does to them before it signs them again."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offsite.config import Method, PackSpec
from offsite.model_owner.base_model import fingerprint, open_base
from offsite.model_owner.bundle_settings import settings_files
from offsite.model_owner.bundle_tensors import bundle_tensors, counts
from offsite.model_owner.check_packing import require_packable
from offsite.model_owner.pack import Parties as Keys
from offsite.model_owner.pack import bundle_manifest, pack
from offsite.model_owner.resolve_defaults import resolve_defaults
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base, Bundle, Return
from offsite.protocol.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BOTTLENECK_WEIGHTS,
    CLASSIFIER,
    RETURNED_WEIGHTS,
    WEIGHTS_OF,
    checkpoint_file,
    tokenizer_digest,
)
from offsite.protocol.home import Home
from offsite.protocol.manifest import (
    MANIFEST,
    SIGNATURE,
    BottleneckSettings,
    FileEntry,
    LoraSettings,
    ReturnManifest,
    TensorEntry,
)
from offsite.protocol.output_head import head_names, returned_head
from offsite.protocol.peft_adapter import adapter_config, adapter_tensors
from offsite.protocol.return_rules import classifier_inputs
from offsite.protocol.sealing import file_entries, seal
from offsite.protocol.signing import Identity
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint, write_checkpoint
from offsite.storage.files import staged_folder, write_stream
from offsite.storage.safetensors_files import from_array, read_float32, read_header, write_safetensors
from tiny import Parties

Array = npt.NDArray[np.float32]


def packed(base: Path, out: Path, parties: Parties, **settings: Any) -> Bundle:
    """A bundle by the real `pack`: 1 + 1 blocks train, the middle stays whole in fp32 unless told otherwise."""
    count = json.loads((base / "config.json").read_text())
    blocks = count.get("num_hidden_layers", count.get("n_layer"))
    spec = {"bottom": 1, "top": 1, "keep": blocks - 2, "heal": "none", "dtype": "fp32", **settings}
    return pack(Base(base), out, "hospital", PackSpec.model_validate(spec), parties.owner)


def packed_unopened(base: Path, out: Path, parties: Parties) -> Bundle:
    """A bundle of all blocks as they are, which is not opened before it is signed: its library may be missing here."""
    spec = PackSpec.model_validate({"bottom": 1, "top": 1, "keep": 1, "heal": "none", "dtype": "fp32"})
    model, owner = open_base(Base(base)), parties.owner
    spec, identity = resolve_defaults(model, spec), owner.identity()
    sandwich = require_packable(model, spec)
    kept = sandwich.kept(sandwich.middle)
    numbers = counts(sandwich, kept, spec)
    with staged_folder(out) as folder:
        written = write_checkpoint(folder, bundle_tensors(model, kept, {}, "F32", numbers, spec, None))
        written += [write_stream(folder / name, [b]) for name, b in settings_files(model, kept, "F32", None).items()]
        keys = Keys(identity.public_key.hex, owner.trusted_key("hospital").hex, fingerprint(model, identity))
        manifest = bundle_manifest(model, kept, numbers, spec, file_entries(written), keys)
        return seal(folder, manifest, identity, out)


def lora_return(
    bundle: Bundle,
    out: Path,
    home: Home,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    b: float = 0.5,
    seed: int = 0,
    head: float | None = None,
) -> Return:
    """A LoRA return on every permitted target; A and B random, B of scale `b` (0 leaves the model as it is).

    With `head` also the head that was shipped, and random numbers of that scale on it.
    """
    lora = LoraSettings(rank=rank, alpha=alpha, targets=tuple(sorted(bundle.manifest.lora_targets)))
    entries = adapter_tensors(lora, bundle.manifest.lora_targets)
    draw = np.random.default_rng(seed)
    arrays = {
        name: (draw.standard_normal(entry.shape) * (b if ".lora_B." in name else 0.2)).astype(np.float32)
        for name, entry in entries.items()
    }
    if head is not None:
        entries |= returned_head(bundle.manifest, "lora")
        arrays |= _tuned_head(bundle, "lora", head)
    family = ARCHITECTURES[bundle.manifest.architecture]
    config = adapter_config(lora, family, head=head is not None)
    with staged_folder(out) as folder:
        written = [
            write_safetensors(folder / ADAPTER_WEIGHTS, [from_array(n, a, "F32") for n, a in arrays.items()]),
            write_stream(folder / ADAPTER_CONFIG, [json.dumps(config, indent=1).encode()]),
        ]
        return _sealed(bundle, out, folder, home, written, "lora", lora, entries, head=head is not None)


def _tuned_head(bundle: Bundle, method: Method, scale: float) -> dict[str, Array]:
    shipped, draw = open_checkpoint(bundle.folder).tensors, np.random.default_rng(7)
    heads = {returned: read_float32(shipped[name]) for returned, name in head_names(bundle.manifest, method).items()}
    return {name: h + (scale * draw.standard_normal(h.shape)).astype(np.float32) for name, h in heads.items()}


def full_return(
    bundle: Bundle,
    out: Path,
    home: Home,
    change: Callable[[str, Array], Array] = lambda name, shipped: shipped,
    method: Method = "full",
    classes: tuple[str, ...] | None = None,
    head: float | None = None,
) -> Return:
    """A full or BitFit return: of every tensor that may come back what `change(name, shipped)` gives, in fp32.

    Of an image encoder also a classifier of these classes, with random weights; with `head` as in `lora_return`.
    """
    shipped = open_checkpoint(bundle.folder).tensors
    arrays = {name: change(name, read_float32(shipped[name])) for name in bundle.manifest.own_tensors(method)}
    arrays |= {} if head is None else _tuned_head(bundle, method, head)
    entries = {name: TensorEntry(shape=array.shape, dtype="F32") for name, array in arrays.items()}
    with staged_folder(out) as folder:
        weights = [from_array(name, array, "F32") for name, array in arrays.items()]
        written = [write_safetensors(folder / RETURNED_WEIGHTS, weights)]
        if classes:
            classifier = {
                "classifier.weight": np.random.default_rng(0).standard_normal(
                    (len(classes), classifier_inputs(bundle.manifest) or 1), dtype=np.float32
                ),
                "classifier.bias": np.zeros(len(classes), dtype=np.float32),
            }
            weights = [from_array(name, array, "F32") for name, array in classifier.items()]
            written.append(write_safetensors(folder / CLASSIFIER, weights))
        made = {"classes": classes, "head": head is not None}
        return _sealed(bundle, out, folder, home, written, method, None, entries, **made)


def bottleneck_return(
    bundle: Bundle, out: Path, home: Home, *, width: int = 4, up: float = 0.5, seed: int = 0
) -> Return:
    """A return of bottlenecks; all random, W_up and its bias of scale `up` (0 leaves the model as it is)."""
    settings = BottleneckSettings(width=width)
    entries = settings.tensors(bundle.manifest)
    draw = np.random.default_rng(seed)
    arrays = {
        name: (draw.standard_normal(entry.shape) * (up if ".up." in name else 0.2)).astype(np.float32)
        for name, entry in entries.items()
    }
    with staged_folder(out) as folder:
        weights = [from_array(name, array, "F32") for name, array in arrays.items()]
        written = [write_safetensors(folder / BOTTLENECK_WEIGHTS, weights)]
        return _sealed(bundle, out, folder, home, written, "bottleneck", None, entries, settings)


def with_earlier(returned: Return, earlier: Sequence[Return], home: Home, **changes: Any) -> Path:
    """Make of a return one that holds the tensors of others, tuned alike, as its earlier checkpoints."""
    weights = WEIGHTS_OF[returned.manifest.method]
    for number, other in enumerate(earlier, 1):
        shutil.copy(other.folder / weights, returned.folder / checkpoint_file(number))
    sign_again(returned.folder, home.identity(), earlier_checkpoints=len(earlier), **changes)
    return returned.folder


def _sealed(
    bundle: Bundle,
    out: Path,
    folder: Path,
    home: Home,
    written: Any,
    method: Method,
    lora: LoraSettings | None,
    tensors: Mapping[str, TensorEntry],
    bottleneck: BottleneckSettings | None = None,
    classes: tuple[str, ...] | None = None,
    head: bool = False,
) -> Return:
    manifest = ReturnManifest(
        kind="return",
        format=1,
        requires=(),
        files=file_entries(written),
        bundle=bundle.digest,
        signer=home.identity().public_key.hex,
        recipient=bundle.manifest.issuer,
        method=method,
        lora=lora,
        bottleneck=bottleneck,
        tensors=dict(tensors),
        classes=classes,
        head=head,
    )
    return seal(folder, manifest, home.identity(), out)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest as plain JSON, to be tampered with."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def sign_again(
    folder: Path,
    identity: Identity,
    *,
    rehash: bool = True,
    listed: Callable[[str], bool] = lambda name: True,
    kind: str | None = None,
    **changes: Any,
) -> None:
    """What a hostile party with a valid key does last: list and hash the files as they are now, and sign.

    Args:
        folder: bundle, return or plug-in.
        identity: the key that signs; the manifest goes on naming whom it names.
        rehash: whether the files are listed anew.
        listed: which files of the folder are listed.
        kind: the kind of document that the signature is for, if not the manifest's.
        changes: fields of the manifest to replace.
    """
    manifest = manifest_of(folder)
    if rehash:
        names = sorted(p.name for p in folder.iterdir() if p.name not in (MANIFEST, SIGNATURE) and p.is_file())
        entries = [
            FileEntry(name=name, size=(folder / name).stat().st_size, sha256=_sha256(folder / name))
            for name in names
            if listed(name)
        ]
        manifest["files"] = [entry.model_dump() for entry in entries]
        if "tokenizer" in manifest:
            manifest["tokenizer"] = tokenizer_digest(entries)
    manifest |= changes
    raw = json.dumps(manifest, indent=1).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / SIGNATURE).write_bytes(identity.sign(kind or manifest["kind"], raw))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None in place of a value takes a key away."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not _GONE}))


_GONE = object()
GONE: Any = _GONE


def edit_weights(file: Path, change: Callable[[dict[str, Array]], None], dtypes: Mapping[str, str] = {}) -> None:
    """Change a safetensors file's tensors in place, as arrays by name; `dtypes` stores some in another dtype."""
    held = read_header(file)
    arrays = {name: read_float32(tensor).copy() for name, tensor in held.items()}
    stored = {name: tensor.dtype for name, tensor in held.items()}
    change(arrays)
    file.unlink()
    write_safetensors(file, [from_array(n, a, dtypes.get(n, stored.get(n, "F32"))) for n, a in arrays.items()])


def edit_bundle_weights(folder: Path, change: Callable[[dict[str, Array]], None]) -> None:
    """`edit_weights` of a bundle in one file."""
    edit_weights(folder / WEIGHTS, change)


def raw_safetensors(file: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: an object, or bytes as they are; `length` is what the file claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def copied_folder(source: Path, out: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, out, symlinks=True))


def hidden_states(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What enters each block, and what leaves the last (before the final norm)."""
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    family = ARCHITECTURES[model.config.model_type]
    seen: list[torch.Tensor] = []
    blocks = model.get_submodule(family.blocks)
    blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids, use_cache=False)
    return tuple(seen)
