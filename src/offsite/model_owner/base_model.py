"""Opens a base checkpoint: its model family, its config, and its tensors by the names that transformers uses today."""

import contextlib
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.models.families.architectures import ARCHITECTURES, Architecture, architecture_of
from offsite.models.quantisation import display_name, method_in_settings, plain_config
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import CONFIG
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.signing import Identity
from offsite.protocol.verify import read_unverified
from offsite.storage.background_hash import BackgroundHash
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, Checkpoint, open_checkpoint
from offsite.storage.finite import has_non_finite
from offsite.storage.safetensors_files import FLOATS, TensorRange, read_chunks
from offsite.storage.strict_json import strict_json

FileStates = tuple[tuple[str, int, int, int], ...]  # for each file: name, inode, bytes, time of last write


@dataclass(frozen=True)
class BaseModel:
    """An opened base model; no weights are in memory.

    `tensors` has each tensor's byte range in its file. Its keys are the names that today's transformers writes to
    files; the base's files may have older names. Buffers, and the stored copy of a tied head, are left out.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Architecture
    tensors: Mapping[str, TensorRange]
    blocks: int
    states: FileStates = ()  # states of the weight files when they were opened

    def block(self, index: int) -> dict[str, TensorRange]:
        """The tensors of the block with this index, keyed by their path in the block, such as "mlp.up_proj.weight"."""
        start = self.family.in_block(index, "")
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def open_base(base: Base) -> BaseModel:
    """Open a base folder: read its config and the headers of its weight files.

    Weights are read only if the config ties the head to the embedding and the files have a head too, because the two
    must be equal.

    Raises:
        StorageError: config or weights are missing or broken.
        IncompatibleError: the family is not supported, tensors are missing or unexpected, or the files hold a tied head
            that differs from the embedding.
        UsageError: the folder is a bundle or a return.
    """
    _require_base(base.folder)
    found = _read_config(base.folder / CONFIG)
    plain = plain_config(found)  # some tools leave settings of quantisation in the config of plain weights
    checkpoint = _open_weights(base.folder, found)
    family, config = _family_and_config(plain, checkpoint.tensors)
    tensors: dict[str, TensorRange] = {}
    for stored in checkpoint.tensors.values():
        for name, tensor in by_todays_names(family, stored).items():
            if name in tensors:
                raise IncompatibleError(
                    f"the weights in {base.folder} hold {name} under two spellings",
                    reasons=[f"{tensors[name].name} and {tensor.name}"],
                    next_step="import the model again from where it was published",
                )
            tensors[name] = tensor
    if family.tied(config) and family.head in tensors:
        _require_copy(tensors.pop(family.head), tensors.get(_token_embedding(family)))
    states = _states_of(tensor.file for tensor in tensors.values())
    model = BaseModel(base.folder, config, family, tensors, family.block_count(config), states)
    _check_tensors(model, method_in_settings(found))
    return model


def _require_base(folder: Path) -> None:
    """Raise an error if the folder is a bundle or a return; a merged plug-in is accepted as a base.

    Raises:
        UsageError: the folder is a bundle or a return.
    """
    kind = read_unverified(folder).kind if (folder / MANIFEST).exists() else "base"
    if kind in ("bundle", "return"):
        raise UsageError(f"{folder} is a {kind}, expected a base", next_step="name the base model's folder")


def _token_embedding(family: Architecture) -> str:
    """The name of the token embedding's tensor: the one of the head's shape among the embeddings."""
    return next(name for name, sizes in family.embeddings.items() if sizes == family.head_size)


def _require_copy(head: TensorRange, embedding: TensorRange | None) -> None:
    """Raise an error if the files have a head that differs from the embedding to which the config ties it.

    transformers would use such a head as a separate one, so the model would differ from its config.

    Args:
        head: the head in the files.
        embedding: the token embedding; None if the files have none.

    Raises:
        IncompatibleError: the head does not equal the embedding bit for bit.
    """
    if embedding is None:
        return  # missing tensors are reported later, all together
    alike = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not alike or any(ours != theirs for ours, theirs in zip(read_chunks(head), read_chunks(embedding), strict=True)):
        raise IncompatibleError(
            f"the config ties the head to the embedding, and {head.file} holds another head",
            reasons=[f"{head.name} differs from {embedding.name}"],
            next_step=f"set tie_word_embeddings to false in {CONFIG} of the base folder",
        )


def by_todays_names(family: Architecture, stored: TensorRange) -> dict[str, TensorRange]:
    """The tensors of a base that a tensor in a file contains, keyed by the names that today's transformers writes.

    In most cases this is the tensor itself. It is nothing for a buffer, which is no weight. A tensor with the stacked
    matrices of all experts is divided into single matrices.
    """
    name = family.name_of(stored.name)
    if name is None:
        return {}
    stack = family.stacked(name, stored.shape[0]) if len(stored.shape) == 3 else None
    if not stack or stored.shape[1] % len(stack[0]):
        return {name: stored}
    shape = (stored.shape[1] // len(stack[0]), stored.shape[2])
    first = replace(stored, shape=shape)
    matrices = [matrix for expert in stack for matrix in expert]  # in the order of the file
    return {matrix: replace(first, start=stored.start + place * first.size) for place, matrix in enumerate(matrices)}


def family_of(config: Mapping[str, Any], stored: Iterable[str] = ()) -> Architecture:
    """The family of a model with this config: its row of the architecture table, or if there is none, a derived family.

    Args:
        config: the content of config.json.
        stored: the names of the tensors in the weight files; if empty, a derived family has only the parameter names of
            transformers' torch model.

    Raises:
        IncompatibleError: the config turns on an option that the row does not support; or there is no row, and the
            blocks, embeddings and head of transformers' model cannot be identified.
    """
    return _family_and_config(config, stored)[0]


def _family_and_config(config: Mapping[str, Any], stored: Iterable[str]) -> tuple[Architecture, Mapping[str, Any]]:
    """The family of a model, and its config; for a derived family, the config as it was completed for this family.

    Args:
        config: the content of config.json.
        stored: the names of the tensors in the weight files; may be empty, see `family_of`.
    """
    if str(config.get("model_type")) in ARCHITECTURES:
        return architecture_of(config), config
    from offsite.models.families.derive_family import derive_family

    derived = derive_family(config, list(stored))
    return derived.family, derived.config


READING = "reading the base"  # the stage of a fingerprint in progress events
_IMPORT_AGAIN = "import the model again with `offsite import MODEL --out base/`"


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = strict_json(file.read_bytes())
    except FileNotFoundError:
        raise StorageError(
            f"{file.parent} holds no {CONFIG}, so it is not a base folder",
            next_step="make one with `offsite import MODEL --out base/`",
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}", reasons=[str(error)], next_step=_IMPORT_AGAIN) from error
    if not isinstance(config, dict):
        raise StorageError(f"{file} is not a JSON object", next_step=_IMPORT_AGAIN)
    return config


def _open_weights(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Open the weights of a base; those in a dtype of 8 bits or fewer are refused as quantised, and not as damaged."""
    try:
        return open_checkpoint(folder)
    except StorageError as error:
        from offsite.model_owner.importing.quantised_source import method_of

        method = None
        with contextlib.suppress(
            StorageError, ValueError, KeyError, TypeError, AttributeError
        ):  # the first error counts
            method = method_of(folder, config) if any((folder / name).is_file() for name in (WEIGHTS, INDEX)) else None
        if method is None:
            raise
        raise _quantised(folder, method, error.reasons) from None


def _quantised(folder: Path, method: str, reasons: Sequence[str]) -> IncompatibleError:
    return IncompatibleError(
        f"the weights in {folder} are quantised with {display_name(method)}, expected plain weights",
        reasons=first(reasons),
        next_step="turn them into plain weights: `offsite import MODEL --out base/`",
    )


def _check_tensors(model: BaseModel, quantised: str | None) -> None:
    """Raise an IncompatibleError if tensors are missing, unexpected, or have a wrong shape or dtype.

    `quantised` is the key of the quantisation method that the config names, for the error; None if it names none.
    """
    family, held = model.family, set(model.tensors)
    expected = family.outer_tensors(model.config) | {
        family.in_block(index, path)
        for index in range(model.blocks)
        for path in family.block_tensors(model.config, index)
    }
    reasons = [f"missing {name}" for name in sorted(expected - held)]
    reasons += [f"unexpected {name}" for name in sorted(held - expected)]
    problems = (family.shape_problem(name, tensor.shape, model.config) for name, tensor in model.tensors.items())
    reasons += [problem for problem in problems if problem]
    reasons += [
        f"{name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"
        for name, tensor in model.tensors.items()
        if tensor.dtype not in FLOATS
    ]
    if reasons and quantised is not None:
        raise _quantised(model.folder, quantised, reasons)
    if reasons:
        raise IncompatibleError(
            f"the weights in {model.folder} are not those of a {family.model_type} model of {model.blocks} blocks",
            reasons=first(reasons),
            next_step="check that config.json belongs to these weights; `offsite import` rebuilds a folder",
        )


def _states_of(files: Iterable[Path]) -> FileStates:
    """The inode, size and time of the last write of each file, to find out later whether it changed."""
    found = [(file.name, file.stat()) for file in sorted(set(files))]
    return tuple((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in found)


def require_unchanged(model: BaseModel) -> None:
    """Raise an error if the base's weight files changed after the base was opened.

    Raises:
        IncompatibleError: a weight file was replaced or written to.
    """
    now = _states_of(tensor.file for tensor in model.tensors.values())
    changed = sorted({name for name, *_ in set(model.states) ^ set(now)})
    if changed:
        raise IncompatibleError(
            f"{model.folder} changed while it was read",
            reasons=[f"{name} was written to" for name in changed],
            next_step="see to it that nobody writes to the base meanwhile, and run the same command again",
        )


def fingerprint(
    model: BaseModel,
    identity: Identity,
    base: Base | None = None,
    bad: list[str] | None = None,
    progress: Progress = silent,
) -> str:
    """The fingerprint of a base, which its bundles contain: HMAC-SHA256 over tensor names, dtypes, shapes and bytes.

    The key is secret, so nobody but the owner can compute the fingerprint and confirm a guess of the base model. Reads
    every weight once.

    Args:
        model: the opened base.
        identity: the model owner's name and private key, from which the HMAC key is derived.
        base: an object that caches the fingerprint, so that unchanged weight files are not read again.
        bad: a list to which the names of tensors with NaN or infinity are appended, unless the fingerprint comes from
            the cache; None if values are not checked.
        progress: receives the progress events, which count tensors.

    Returns:
        64 hex digits.
    """
    known = base.fingerprints if base is not None else {}
    key = (identity.public_key.hex, model.states)
    if key not in known:
        known[key] = _fingerprint(model, identity, bad, progress)
    return known[key]


def _fingerprint(model: BaseModel, identity: Identity, bad: list[str] | None, progress: Progress) -> str:
    """Compute the fingerprint without a cache; arguments as for `fingerprint`."""
    code = hmac.new(identity.secret("base fingerprint"), digestmod=hashlib.sha256)
    with BackgroundHash(code.update) as hashing:
        for done, name in enumerate(sorted(model.tensors)):
            progress(Event(READING, done, len(model.tensors)))
            _add_tensor(hashing, name, model.tensors[name], bad)
    progress(Event(READING, len(model.tensors), len(model.tensors)))
    return code.hexdigest()


def _add_tensor(hashing: BackgroundHash, name: str, tensor: TensorRange, bad: list[str] | None) -> None:
    """Add a tensor to the fingerprint's hash; arguments as for `fingerprint`."""
    hashing.add(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    for chunk in read_chunks(tensor):
        hashing.add(chunk)
        if bad is not None and has_non_finite(chunk, tensor.dtype) and name not in bad:
            bad.append(name)
