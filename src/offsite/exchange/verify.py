"""Verifying what a stranger sent: hashes, signatures and safetensors headers, and nothing that runs a model.

Verify, then parse, then load. Every rule is a function that lists what it found wrong; all rules run, so that one look
shows every reason. Torch-free.
"""

import hashlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from offsite.core.architectures import ARCHITECTURES, Architecture, config_problems
from offsite.core.checkpoint import (
    FLOATS,
    INDEX,
    WEIGHTS,
    Checkpoint,
    TensorRange,
    finite,
    open_checkpoint,
    read_header,
    strict_json,
)
from offsite.core.storage import sha256_of
from offsite.errors import OffsiteError, PolicyError, StorageError, UsageError, VerificationError
from offsite.exchange.artifacts import Bundle, PlugIn, Return
from offsite.exchange.contents import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ALLOWED_KEYS,
    CONFIG,
    RETURNED_WEIGHTS,
    allowed_in_bundle,
    content_problems,
    is_weights,
    tokenizer_digest,
)
from offsite.exchange.home import Home
from offsite.exchange.lora_folder import adapter_config, adapter_tensors, lora_pair
from offsite.exchange.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    SIGNATURE,
    BundleManifest,
    Manifest,
    ManifestProblem,
    PlugInManifest,
    ReturnManifest,
    TensorEntry,
    parse_manifest,
)
from offsite.exchange.signing import SIGNATURE_BYTES, PublicKey

_CONFIG_BYTES = 16 * 2**20  # no JSON file of an artifact is larger; tokenizer.json is never parsed here
_SHOWN = 40  # reasons that are listed in full; who sends more is not worth more of the screen


def verify(path: Path, home: Home) -> Bundle | Return | PlugIn:
    """Verify an artifact of any kind.

    Raises:
        UsageError: the folder is no artifact.
        VerificationError: it fails; reasons list every failure.
    """
    manifest = read_unverified(path)
    if isinstance(manifest, BundleManifest):
        return verify_bundle(path, home)
    if isinstance(manifest, ReturnManifest):
        return verify_return(path, home)
    return verify_plug_in(path, home)


def verify_bundle(path: Path, home: Home) -> Bundle:
    """Verify a bundle that a trusted owner addressed to this party (or one that this party issued).

    Raises:
        UsageError: the folder is no bundle.
        VerificationError: it fails; reasons list every failure.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, BundleManifest):
        raise _wrong_kind(sealed, "bundle")
    _run(sealed, (*_ENVELOPE_RULES, *_BUNDLE_RULES))
    return Bundle(path, sealed.manifest, sealed.digest)


def verify_return(path: Path, home: Home, bundle: BundleManifest | None = None) -> Return:
    """Verify a return that a trusted data owner addressed to this party (or one that this party made).

    Args:
        path: the return's folder.
        home: whose trusted keys count.
        bundle: the manifest of the bundle that it answers, from the ledger; without it, what that bundle permits
            cannot be checked.

    Raises:
        UsageError: the folder is no return.
        VerificationError: it fails; reasons list every failure.
        PolicyError: it is genuine, but uses a method or rank that the bundle does not permit.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, ReturnManifest):
        raise _wrong_kind(sealed, "return")
    policy = _beyond_policy(sealed.manifest, bundle) if bundle else []
    _run(sealed, (*_ENVELOPE_RULES, *_RETURN_RULES), parent=bundle, beside=policy)
    if policy:
        raise PolicyError(
            "the return goes beyond what the bundle permits",
            reasons=policy,
            next_step="ask for a return within it, or issue another bundle that permits more",
        )
    return Return(path, sealed.manifest, sealed.digest)


def verify_plug_in(path: Path, home: Home) -> PlugIn:
    """Verify that a plug-in is as this party, or one that it trusts, wrote it.

    Raises:
        UsageError: the folder is no plug-in.
        VerificationError: it fails; reasons list every failure.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, PlugInManifest):
        raise _wrong_kind(sealed, "plug-in")
    _run(sealed, _ENVELOPE_RULES)
    return PlugIn(path, sealed.manifest, sealed.digest)


def read_unverified(path: Path) -> Manifest:
    """The manifest of an artifact, to look at only: nothing has been verified.

    Raises:
        UsageError: the folder is no artifact.
        VerificationError: its manifest cannot be read.
    """
    return _read_manifest(path)[0]


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    try:  # read once: what is parsed are the bytes whose signature is checked
        raw = _read_bounded(_plain_file(path, MANIFEST), MANIFEST_BYTES)
        return parse_manifest(raw), raw
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path} is no bundle, return or plug-in",
            reasons=[f"it holds no {MANIFEST}"],
            next_step="name the folder that holds it",
        ) from None
    except ManifestProblem as problem:
        raise _failed(path, problem.reasons) from None
    except OSError as error:
        raise StorageError(
            f"cannot read {path / MANIFEST}: {error.strerror}", next_step="check the folder's permissions and its disk"
        ) from error


@dataclass(frozen=True)
class _Sealed:
    """A folder with its parsed manifest, before any rule has passed."""

    folder: Path
    home: Home
    manifest: Manifest
    raw: bytes
    parent: BundleManifest | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def signer(self) -> str:
        return self.manifest.signer if isinstance(self.manifest, ReturnManifest) else self.manifest.issuer


_Rule = Callable[[_Sealed], Iterator[str]]


def _open(path: Path, home: Home) -> _Sealed:
    manifest, raw = _read_manifest(path)
    return _Sealed(path, home, manifest, raw)


def _run(
    sealed: _Sealed,
    rules: tuple[_Rule, ...],
    parent: BundleManifest | None = None,
    beside: Sequence[str] = (),
) -> None:
    subject = replace(sealed, parent=parent)
    reasons: list[str] = []
    for rule in rules:
        try:
            reasons += rule(subject)
        except OffsiteError as error:  # a broken file is a finding like any other
            reasons += error.reasons or [error.what]
        except OSError as error:
            reasons.append(f"cannot read {str(error.filename)!r}: {error.strerror}")
    if reasons:
        raise _failed(sealed.folder, list(dict.fromkeys([*reasons, *beside])))


# --- the envelope: signature, addressee, files -------------------------------------------------------------------


def _signature(sealed: _Sealed) -> Iterator[str]:
    file = sealed.folder / SIGNATURE
    signature = _read_bounded(file, SIGNATURE_BYTES) if _is_plain(file) else b""
    if not PublicKey.from_hex(sealed.signer).verifies(signature, sealed.manifest.kind, sealed.raw):
        yield f"the signature in {SIGNATURE} is not the signer's over these bytes of {MANIFEST}"


def _trusted_signer(sealed: _Sealed) -> Iterator[str]:
    keys = {key.hex for key in sealed.home.trusted().values()} | {sealed.home.identity().public_key.hex}
    if sealed.signer not in keys:
        fingerprint = PublicKey.from_hex(sealed.signer).fingerprint
        yield f"signed by {fingerprint}, not trusted here (`offsite trust add NAME FILE.pub`, after checking it)"


def _addressee(sealed: _Sealed) -> Iterator[str]:
    own = sealed.home.identity().public_key.hex
    if isinstance(sealed.manifest, PlugInManifest) or own in (sealed.manifest.recipient, sealed.signer):
        return
    found = PublicKey.from_hex(sealed.manifest.recipient).fingerprint
    yield f"addressed to {found}, this party is {PublicKey.from_hex(own).fingerprint}"


def _listing(sealed: _Sealed) -> Iterator[str]:
    listed = {entry.name for entry in sealed.manifest.files} | {MANIFEST, SIGNATURE}
    found = set()
    for path in sorted(sealed.folder.iterdir()):
        found.add(path.name)
        if not stat.S_ISREG(path.lstat().st_mode):
            yield f"{path.name!r} is no plain file"
        elif path.name not in listed:
            yield f"{path.name!r} is not listed in {MANIFEST}"
    for name in sorted(listed - found):
        yield f"{name} is missing"


def _digests(sealed: _Sealed) -> Iterator[str]:
    for entry in sealed.manifest.files:
        path = sealed.folder / entry.name
        if not _is_plain(path):
            continue  # _listing says so
        if path.stat().st_size != entry.size:
            yield f"{entry.name} has {path.stat().st_size} bytes, expected {entry.size}"
        elif sha256_of(path) != entry.sha256:
            yield f"the bytes of {entry.name} are not those that were signed"


_ENVELOPE_RULES: tuple[_Rule, ...] = (_signature, _trusted_signer, _addressee, _listing, _digests)


# --- a bundle ----------------------------------------------------------------------------------------------------


def _bundle_files(sealed: _Sealed) -> Iterator[str]:
    for entry in sealed.manifest.files:
        if not allowed_in_bundle(entry.name):
            yield f"a bundle may not hold {entry.name}"


def _bundle_settings(sealed: _Sealed) -> Iterator[str]:
    listed = {entry.name for entry in sealed.manifest.files}
    for name in sorted(listed & set(ALLOWED_KEYS)):
        yield from content_problems(name, _read_json(sealed, name))


def _bundle_config(sealed: _Sealed) -> Iterator[str]:
    manifest, row = _bundle_of(sealed)
    config = _read_json(sealed, CONFIG)
    if not isinstance(config, dict):
        yield f"{CONFIG} is not a JSON object"
        return
    yield from config_problems(config, row)
    if config.get("model_type") != row.model_type or config.get("architectures") != [row.class_name]:
        found = f"{config.get('model_type')!r}, {config.get('architectures')!r}"
        yield f"{CONFIG} names the model {found[:120]}, expected {row.model_type!r}, {[row.class_name]!r}"
    counts = {key: config[key] for key in row.count_keys if key in config}
    if not counts or any(type(count) is not int or count != manifest.split.blocks for count in counts.values()):
        yield f"{CONFIG} has block counts {str(counts)[:120]}, the split has {manifest.split.blocks}"
    for key, value in row.set_switches(config).items():
        yield f"{CONFIG} has {key} = {str(value)[:60]!r}, under which blocks cannot be cut"


def _bundle_weights(sealed: _Sealed) -> Iterator[str]:
    manifest, row = _bundle_of(sealed)
    checkpoint = _open_listed(sealed)
    config = _read_json(sealed, CONFIG)
    settings = config if isinstance(config, dict) else {}
    paths = row.block_tensors(settings)
    expected = row.outer_tensors(settings) | {
        row.in_block(block, path) for block in range(manifest.split.blocks) for path in paths
    }
    yield from _names_differ("weights", set(checkpoint.tensors), expected)
    for name, tensor in checkpoint.tensors.items():
        problem = row.shape_problem(name, tensor.shape, settings)
        if problem:
            yield problem
        place = row.block_of(name)
        twin = checkpoint.tensors.get(row.in_block(0, place[1])) if place else None
        if twin is not None and tensor.shape != twin.shape:
            yield f"{name[:120]!r} has shape {list(tensor.shape)}, the first block's has {list(twin.shape)}"
        if tensor.dtype not in FLOATS:
            yield f"{name[:120]!r} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"


def _bundle_returnable(sealed: _Sealed) -> Iterator[str]:
    manifest, row = _bundle_of(sealed)
    checkpoint = _open_listed(sealed)
    trained = {n for n in checkpoint.tensors if (p := row.block_of(n)) and p[0] in manifest.split.trained}
    yield from _names_differ("tensors that may come back", set(manifest.tensors), trained)
    yield from _entries_differ(manifest.tensors, checkpoint.tensors)
    for target, (inputs, outputs) in manifest.lora_targets.items():
        weight = checkpoint.tensors.get(f"{target}.weight")
        shape = (inputs, outputs) if row.transposed else (outputs, inputs)
        if weight is None or weight.shape != shape:
            found = weight.shape if weight else "no such weight"
            yield f"LoRA target {target}: the weight's shape is {found}, expected {shape}"


def _bundle_tokenizer(sealed: _Sealed) -> Iterator[str]:
    manifest, _ = _bundle_of(sealed)
    if tokenizer_digest(manifest.files) != manifest.tokenizer:
        yield "the tokenizer's files do not give the tokenizer digest of the manifest"


_BUNDLE_RULES: tuple[_Rule, ...] = (
    _bundle_files,
    _bundle_settings,
    _bundle_config,
    _bundle_weights,
    _bundle_returnable,
    _bundle_tokenizer,
)


def _bundle_of(sealed: _Sealed) -> tuple[BundleManifest, Architecture]:
    if not isinstance(sealed.manifest, BundleManifest):
        raise TypeError("a rule for bundles was run on something else")
    return sealed.manifest, ARCHITECTURES[sealed.manifest.architecture]


def _open_listed(sealed: _Sealed) -> Checkpoint:
    weights = [entry.name for entry in sealed.manifest.files if is_weights(entry.name)]
    if {WEIGHTS, INDEX} <= set(weights):
        raise VerificationError(f"it holds both {WEIGHTS} and {INDEX}, of which another reader may take the other")
    for name in weights:
        _plain_file(sealed.folder, name)
    checkpoint = open_checkpoint(sealed.folder)
    used = {tensor.file.name for tensor in checkpoint.tensors.values()}
    listed = set(weights) - {INDEX}
    if used != listed:
        raise VerificationError(f"the weights' files are {sorted(listed)}, the index uses {sorted(used)}")
    return checkpoint


# --- a return ----------------------------------------------------------------------------------------------------


def _return_files(sealed: _Sealed) -> Iterator[str]:
    manifest = _return_of(sealed)
    expected = {ADAPTER_CONFIG, ADAPTER_WEIGHTS} if manifest.lora else {RETURNED_WEIGHTS}
    yield from _names_differ("files", {entry.name for entry in manifest.files}, expected)


def _return_tensors(sealed: _Sealed) -> Iterator[str]:
    manifest = _return_of(sealed)
    held = _returned_weights(sealed)
    yield from _names_differ("tensors in the file", set(held), set(manifest.tensors))
    yield from _entries_differ(manifest.tensors, held)
    yield from (f"{name[:120]!r} has dtype {t.dtype}, expected F32" for name, t in held.items() if t.dtype != "F32")


def _return_finite(sealed: _Sealed) -> Iterator[str]:
    for name, tensor in _returned_weights(sealed).items():
        if tensor.dtype in FLOATS and not finite(tensor):
            yield f"{name[:120]!r} holds NaN or infinity"


def _return_lora(sealed: _Sealed) -> Iterator[str]:
    manifest = _return_of(sealed)
    lora, parent = manifest.lora, sealed.parent
    if lora is None:
        return
    if len(set(lora.targets)) != len(lora.targets):
        yield "a LoRA target is named twice"
    strange = sorted(set(lora.targets) - set(parent.lora_targets)) if parent else []
    yield from (f"LoRA sits on {name}, which the bundle does not permit" for name in strange)
    if parent is None:  # shapes are the bundle's to say
        names = {name for target in lora.targets for name in lora_pair(target)}
        yield from _names_differ("tensors", set(manifest.tensors), names)
    elif not strange:
        yield from _manifest_tensors_differ(manifest.tensors, adapter_tensors(lora, parent.lora_targets))
    rows = [ARCHITECTURES[parent.architecture]] if parent else ARCHITECTURES.values()
    held = _read_json(sealed, ADAPTER_CONFIG)
    # compared as text, in which 1 is not true
    if json.dumps(held, sort_keys=True) not in [json.dumps(adapter_config(lora, row), sort_keys=True) for row in rows]:
        yield f"{ADAPTER_CONFIG} is not the one that these LoRA settings give"


def _return_full(sealed: _Sealed) -> Iterator[str]:
    manifest = _return_of(sealed)
    if manifest.lora is None and sealed.parent is not None:
        expected = {n: TensorEntry(shape=e.shape, dtype="F32") for n, e in sealed.parent.tensors.items()}
        yield from _manifest_tensors_differ(manifest.tensors, expected)


def _return_parties(sealed: _Sealed) -> Iterator[str]:
    manifest = _return_of(sealed)
    if sealed.parent is None:
        return
    if manifest.signer != sealed.parent.recipient:
        yield "signed by another party than the one that the bundle was issued to"
    if manifest.recipient != sealed.parent.issuer:
        yield "addressed to another party than the one that issued the bundle"


_RETURN_RULES: tuple[_Rule, ...] = (
    _return_files,
    _return_tensors,
    _return_finite,
    _return_lora,
    _return_full,
    _return_parties,
)


def _returned_weights(sealed: _Sealed) -> dict[str, TensorRange]:
    name = ADAPTER_WEIGHTS if _return_of(sealed).lora else RETURNED_WEIGHTS
    return read_header(_plain_file(sealed.folder, name))


def _return_of(sealed: _Sealed) -> ReturnManifest:
    if not isinstance(sealed.manifest, ReturnManifest):
        raise TypeError("a rule for returns was run on something else")
    return sealed.manifest


def _beyond_policy(manifest: ReturnManifest, bundle: BundleManifest) -> list[str]:
    reasons = []
    if manifest.method not in bundle.methods:
        reasons.append(f"tuned by {manifest.method}, the bundle permits {', '.join(bundle.methods)}")
    if manifest.lora and manifest.lora.rank > bundle.max_rank:
        reasons.append(f"LoRA of rank {manifest.lora.rank}, the bundle permits up to {bundle.max_rank}")
    return reasons


# --- shared by the rules -----------------------------------------------------------------------------------------


def _names_differ(what: str, found: Set[str], expected: Set[str]) -> Iterator[str]:
    for label, names in (("unexpected", sorted(found - expected)), ("missing", sorted(expected - found))):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            yield f"{what}: {label} {', '.join(repr(name[:120]) for name in names[:6])}{more}"


def _entries_differ(entries: Mapping[str, TensorEntry], held: Mapping[str, TensorRange]) -> Iterator[str]:
    for name in sorted(set(entries) & set(held)):
        found = TensorEntry.model_construct(shape=held[name].shape, dtype=held[name].dtype)
        if (found.shape, found.dtype) != (entries[name].shape, entries[name].dtype):
            yield f"{name} is {_shown(found)} in the file, {_shown(entries[name])} in {MANIFEST}"


def _manifest_tensors_differ(found: dict[str, TensorEntry], expected: dict[str, TensorEntry]) -> Iterator[str]:
    yield from _names_differ("tensors", set(found), set(expected))
    for name in sorted(set(found) & set(expected)):
        if found[name] != expected[name]:
            yield f"{name} is {_shown(found[name])}, expected {_shown(expected[name])}"


def _shown(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _read_json(sealed: _Sealed, name: str) -> object:
    raw = _read_bounded(_plain_file(sealed.folder, name), _CONFIG_BYTES)
    if len(raw) > _CONFIG_BYTES:
        raise VerificationError(f"{name} is over {_CONFIG_BYTES} bytes")
    try:
        return strict_json(raw)
    except ValueError as error:
        raise VerificationError(f"{name} is not JSON: {error}") from None


def _is_plain(file: Path) -> bool:
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except FileNotFoundError:
        return False


def _plain_file(folder: Path, name: str) -> Path:
    """A file that may be opened: a link may lead out of the folder, and reading a pipe may never end."""
    if not stat.S_ISREG((folder / name).lstat().st_mode):
        raise VerificationError(f"{name!r} is no plain file")
    return folder / name


def _read_bounded(file: Path, limit: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(limit + 1)


def _failed(folder: Path, reasons: list[str]) -> VerificationError:
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    return VerificationError(
        f"{folder} fails verification",
        reasons=[*reasons[:_SHOWN], *more],
        next_step="do not use it; ask the sender for it again, and compare key fingerprints by another channel",
    )


def _wrong_kind(sealed: _Sealed, expected: str) -> UsageError:
    return UsageError(
        f"{sealed.folder} is a {sealed.manifest.kind}, expected a {expected}",
        next_step=f"name the {expected}'s folder",
    )
