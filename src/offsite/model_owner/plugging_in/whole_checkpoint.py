"""Makes a plug-in from a multi-modal checkpoint: a copy of the checkpoint with its language model tuned.

The base is this language model alone. Its import record has the name of each tensor in the checkpoint. All other
tensors and files are copied. Torch-free.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.importing.import_record import RECORD, ImportRecord, Place, read_record
from offsite.protocol.contents import (
    BESIDE_A_MODEL,
    CONFIG,
    GENERATION_CONFIG,
    OF_PROCESSORS,
    PROCESSOR,
    TOKENIZER_FILES,
)
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import NewTensor, TensorRange, copied, from_float32, read_chunks, to_float32

_FILES = (CONFIG, GENERATION_CONFIG, PROCESSOR, *OF_PROCESSORS, *TOKENIZER_FILES, *BESIDE_A_MODEL)


def whole_tensors(model: BaseModel, changes: Mapping[str, NewTensor], whole: Path) -> list[NewTensor]:
    """The tensors of the multi-modal checkpoint, with new values for those that a return changes.

    All have the dtype of the checkpoint. Reads the language model's tensors once, to compare them with the base.

    Args:
        model: the opened base, which was imported from the checkpoint.
        changes: the tensors that the return changes, keyed by their names in the base.
        whole: the folder of the checkpoint.

    Raises:
        UsageError: the base was not imported from a multi-modal checkpoint.
        IncompatibleError: the checkpoint is not the one that the base was imported from.
        StorageError: the checkpoint is incomplete or damaged.
    """
    record = read_record(model.folder)
    if record.tower_of is None:
        raise UsageError(
            f"{model.folder} is not the language model of a multi-modal checkpoint",
            reasons=[f"{RECORD}, which `offsite import` writes for such a base, is not there or says otherwise"],
            next_step="plug in without --whole",
        )
    held = open_checkpoint(whole).tensors
    _require_source(model, record, held, whole)
    new = {}
    for name, tensor in changes.items():
        place = record.tensors[name]
        new[place.name] = _in_place(tensor, held[place.name], place)
    return [new.get(name) or copied(tensor) for name, tensor in held.items()]


def whole_files(whole: Path) -> dict[str, bytes]:
    """The contents of the checkpoint's files other than weights, such as config and tokenizer, keyed by file name."""
    return {name: (whole / name).read_bytes() for name in _FILES if (whole / name).is_file()}


def _require_source(model: BaseModel, record: ImportRecord, held: Mapping[str, TensorRange], whole: Path) -> None:
    """Raise an error if the base's tensors differ from those of the checkpoint, compared in the base's dtype.

    Args:
        model: the opened base.
        record: the base's import record.
        held: the checkpoint's tensors, keyed by name.
        whole: the checkpoint's folder, for the error.

    Raises:
        IncompatibleError: tensors are missing or differ; at most 20 are listed.
    """
    reasons = []
    for name, tensor in model.tensors.items():
        place = record.tensors.get(name)
        stored = held.get(place.name) if place else None
        if place is None or stored is None:
            reasons.append(f"missing {place.name if place else name}")
            continue
        part = replace(stored, shape=(place.rows or stored.shape[0], *stored.shape[1:])) if stored.shape else stored
        if part.shape != tensor.shape or not _same_bytes(part, tensor):
            reasons.append(f"{place.name} differs from the base's {name}")
    if reasons:
        raise IncompatibleError(
            f"{whole} is not the checkpoint that {model.folder} was imported from",
            reasons=first(reasons),
            next_step="name the folder that `offsite import` was given for this base",
        )


def _same_bytes(stored: TensorRange, tensor: TensorRange) -> bool:
    """Whether a tensor of the checkpoint, converted to the dtype of the base's tensor, equals it bit for bit."""
    ours, theirs = _bytes(read_chunks(tensor)), _bytes(read_chunks(stored, tensor.dtype))
    return all(a == b for a, b in zip(ours, theirs, strict=True))


def _bytes(chunks: Iterator[bytes | memoryview], size: int = 2**20) -> Iterator[bytes]:
    """Yield the bytes of all chunks, regrouped in pieces of `size` bytes; the last piece may be shorter."""
    rest = b""
    for chunk in chunks:
        rest += bytes(chunk)
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    yield rest


def _in_place(tensor: NewTensor, stored: TensorRange, place: Place) -> NewTensor:
    """A changed tensor with its name and dtype in the checkpoint, followed by the rows that the base does not have.

    Args:
        tensor: the tensor with its new values, of the base's shape.
        stored: the tensor in the checkpoint.
        place: its entry in the import record, with the number of rows that the base has.
    """

    def chunks() -> Iterator[bytes | memoryview]:
        parts = tensor.chunks()
        if tensor.dtype == stored.dtype:
            yield from parts
        else:
            for part in parts:
                yield from_float32(to_float32(part, tensor.dtype), stored.dtype).tobytes()
        if place.rows is not None:
            yield from _behind(stored, place.rows).raw()

    return NewTensor(stored.name, stored.dtype, stored.shape, lambda: chain(chunks()))


def _behind(stored: TensorRange, rows: int) -> TensorRange:
    """The byte range of a stored tensor without its first `rows` rows."""
    front = replace(stored, shape=(rows, *stored.shape[1:]))
    return replace(stored, shape=(stored.shape[0] - rows, *stored.shape[1:]), start=stored.start + front.size)
