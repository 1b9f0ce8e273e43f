"""Reads the files of an artifact so that only bytes that were hashed and compared are ever used. Torch-free.

Each file is opened once and read once, from its first byte to its last. During that read it is hashed, a safetensors
header is parsed, tensors are searched for NaN if requested, and bytes for later use remain in memory. No content is
returned before the hash of the whole file is known.
"""

import ctypes
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from offsite.errors import OffsiteError, StorageError, VerificationError
from offsite.storage.checkpoint_folder import Checkpoint, checkpoint_of
from offsite.storage.files import Written
from offsite.storage.regular_files import open_regular
from offsite.storage.safetensors_files import (
    CHUNK_BYTES,
    FLOATS,
    ITEM_SIZE,
    TensorRange,
    parse_header,
    read_header_bytes,
    to_float32,
)

SETTINGS_BYTES = 256 * 2**20  # limit for all files without tensors together; the largest tokenizers have 40 MiB
_READ_BYTES = 2**20  # bytes read and hashed at once: they fit in the CPU's cache; a multiple of every item size
_ALIGNMENT = 64  # a tensor's first byte has an address that is a multiple of this, as in torch


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor in memory.

    `content` is its bytes. If they were read into memory, they are writable, and their address is a multiple of 64. If
    they are mapped from a file (see `offsite.storage.mapped_files`), they are read-only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: memoryview

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def raw(self) -> Iterator[memoryview]:
        """Yield the tensor's bytes, a few MiB at a time."""
        for start in range(0, self.size, CHUNK_BYTES):
            yield self.content[start : start + CHUNK_BYTES]

    def rows(self, rows: slice) -> "HeldTensor":
        """The rows from `rows.start` to `rows.stop` of the first axis; a tensor without axes has one row."""
        row = self.size // max(1, (self.shape or (1,))[0])
        content = self.content[rows.start * row : rows.stop * row]
        return replace(self, shape=(rows.stop - rows.start, *self.shape[1:]), content=content)


@dataclass
class ReadFile:
    """The result of reading one file once; its size and hash are not yet compared with the expected ones."""

    size: int
    sha256: str | None = None  # in hex; None if it was not read to its end, or shrank or grew meanwhile
    content: bytes | None = None  # None for a file of tensors, and for a file that is too large
    header: Mapping[str, TensorRange] | None = None  # None for a file without tensors, and if it is malformed
    problem: StorageError | None = None  # the fault in the header, if it is malformed
    tensors: dict[str, HeldTensor] | None = None  # None if they are not held in memory
    not_finite: list[str] = field(default_factory=list)  # names of tensors with NaN or infinity, if searched for

    def is_file(self, listed: Written) -> bool:
        """Whether the size and hash that were read equal those in `listed`, the manifest's entry for the file."""
        return (self.size, self.sha256) == (listed.size, listed.sha256)


def holds_tensors(name: str) -> bool:
    """Whether a file with this name is read as a safetensors file; it ends in ".safetensors"."""
    return name.endswith(".safetensors")


def read_file(
    file: Path, expected: int | None = None, *, hold: bool, most: int = SETTINGS_BYTES, look_for_nan: bool = False
) -> ReadFile:
    """Read a file once, and hash it at the same time.

    A file of another size than expected, one that is too large for its kind, and one of tensors with a malformed header
    are neither read to their end nor hashed.

    Args:
        file: the file's path.
        expected: its size in bytes, if known.
        hold: whether its tensors remain in memory.
        most: the largest size in bytes of a file without tensors.
        look_for_nan: whether float tensors are searched for NaN and infinity.

    Raises:
        VerificationError: it is not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(file) as stream:
        found = ReadFile(os.fstat(stream.fileno()).st_size)
        digest = hashlib.sha256()
        if expected not in (None, found.size) or (not holds_tensors(file.name) and found.size > most):
            return found
        if holds_tensors(file.name):
            length = _read_header(file, stream, found, digest.update)
            if found.problem:
                return found
            length += _read_tensors(stream, found, digest.update, hold=hold, look_for_nan=look_for_nan)
        else:
            content = bytearray()
            length = _read_rest(stream, found.size, digest.update, content.extend)
            found.content = bytes(content)
        length += len(stream.read(1))
        if length == found.size:
            found.sha256 = digest.hexdigest()
        else:  # it shrank or grew while it was read
            found.size = length
    return found


def read_header_of(file: Path, sha256: str) -> ReadFile:
    """Read the header of a file of tensors, and its size; `sha256` is the hash, in hex, that it was written with.

    Raises:
        VerificationError: it is not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(file) as stream:
        found = ReadFile(os.fstat(stream.fileno()).st_size, sha256)
        _read_header(file, stream, found, lambda _: None)
    return found


_Consumer = Callable[[memoryview], object]


def _read_header(file: Path, stream: BinaryIO, found: ReadFile, consume: Callable[[bytes], object]) -> int:
    """Store the parsed header in `found`, or the error if it is malformed.

    Returns the number of bytes that were passed to `consume`, which hashes them.
    """
    try:
        raw = read_header_bytes(file, stream, found.size)
    except StorageError as problem:  # with the length alone
        found.problem = problem
        stream.seek(0)
        return 0
    consume(raw)
    try:
        found.header = parse_header(file, raw[8:], found.size)
    except StorageError as problem:
        found.problem = problem
    return len(raw)


def _read_tensors(stream: BinaryIO, found: ReadFile, consume: _Consumer, *, hold: bool, look_for_nan: bool) -> int:
    """Read the bytes after the header, tensor by tensor in file order; return the number of bytes read.

    Args:
        stream: the file, at the end of its header.
        found: gets the tensors (with `hold`) and the names of those with NaN or infinity.
        consume: called with all bytes in order, to hash them.
        hold: whether the tensors remain in memory.
        look_for_nan: whether float tensors are searched for NaN and infinity.
    """
    if found.header is None:
        return _read_rest(stream, found.size, consume, lambda _: None)
    read = 0
    tensors: dict[str, HeldTensor] = {}
    for tensor in sorted(found.header.values(), key=lambda one: one.start):
        content = _aligned(tensor.size) if hold else memoryview(bytearray(min(tensor.size, _READ_BYTES)))
        bad = False
        for start in range(0, tensor.size, _READ_BYTES):
            place = start if hold else 0
            part = content[place : place + min(_READ_BYTES, tensor.size - start)]
            length = _fill(stream, part)
            consume(part[:length])
            read += length
            if length < len(part):
                return read
            bad = bad or (look_for_nan and tensor.dtype in FLOATS and not _finite(part, tensor.dtype))
        if bad:
            found.not_finite.append(tensor.name)
        if hold:
            tensors[tensor.name] = HeldTensor(tensor.name, tensor.dtype, tensor.shape, content)
    found.tensors = {name: tensors[name] for name in found.header} if hold else None
    return read


def _read_rest(stream: BinaryIO, most: int, consume: _Consumer, keep: _Consumer) -> int:
    """Read at most `most` remaining bytes of a stream; return the number of bytes read.

    Each chunk is passed to `consume`, which hashes it, and to `keep`, which may store it.
    """
    buffer = memoryview(bytearray(min(_READ_BYTES, max(most, 1))))
    read = 0
    while read < most and (length := _fill(stream, buffer[: most - read])):
        consume(buffer[:length])
        keep(buffer[:length])
        read += length
    return read


def _fill(stream: BinaryIO, part: memoryview) -> int:
    """Read until `part` is full or the file ends; return the number of bytes read."""
    filled = 0
    while filled < len(part) and (count := stream.readinto(part[filled:])):  # type: ignore[attr-defined]
        filled += count
    return filled


def _aligned(size: int) -> memoryview:
    """Allocate `size` bytes at an address that is a multiple of 64."""
    buffer = bytearray(size + _ALIGNMENT)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % _ALIGNMENT
    return memoryview(buffer)[start : start + size]


def _finite(content: memoryview, dtype: str) -> bool:
    """Whether the bytes of a float tensor contain neither NaN nor infinity."""
    import numpy as np  # here, as verifying a bundle does not need it

    return bool(np.isfinite(to_float32(content, dtype)).all())


class Snapshot:
    """The files that a signed manifest lists; every read returns exactly the bytes whose hash is in the manifest.

    A file that is not in memory is read again when it is needed; its hash is compared again before its content is
    returned.

    Args:
        folder: the folder's path.
        listed: every file with its size and hash.
        held: the files that were already read and compared with their hashes, by name.
    """

    def __init__(self, folder: Path, listed: Iterable[Written], held: Mapping[str, ReadFile] | None = None) -> None:
        self.folder = folder
        self._listed = {entry.name: entry for entry in listed}
        self._held = {name: file for name, file in (held or {}).items() if name in self._listed}

    def names(self) -> Set[str]:
        """The names of all listed files."""
        return self._listed.keys()

    def read(self, name: str) -> bytes:
        """The content of a file that contains no tensors.

        Raises:
            FileNotFoundError: no listed file has that name.
            VerificationError: the file was read again, and has changed since it was hashed.
            StorageError: the file cannot be read, or contains tensors.
        """
        file = self._of(name, hold=False)
        if file.content is None:
            raise StorageError(f"{self.folder / name} is not read into memory")
        return file.content

    def header(self, name: str) -> dict[str, TensorRange]:
        """The position of each tensor in the file `name`, by tensor name.

        Raises as `read`, and StorageError if the file has no valid safetensors header.
        """
        file = self._of(name, hold=False)
        if file.header is None:
            raise file.problem or StorageError(f"{self.folder / name} holds no tensors")
        return dict(file.header)

    def tensors(self, name: str) -> dict[str, HeldTensor]:
        """The tensors of the file `name`, by tensor name; they are read into memory and remain there.

        Raises as `header`.
        """
        file = self._of(name, hold=True)
        if file.tensors is None:
            raise file.problem or StorageError(f"{self.folder / name} holds no tensors")
        return file.tensors

    def take_tensors(self) -> dict[str, HeldTensor]:
        """The tensors of all files, by name; the snapshot drops its references, so that the caller can free the memory.

        Raises:
            VerificationError: a file was read again, and has changed since it was hashed.
            StorageError: a file cannot be read, or the files are not a valid checkpoint.
        """
        files = [name for name in sorted(self.names()) if holds_tensors(name)]
        taken = {name: tensor for file in files for name, tensor in self.tensors(file).items()}
        self.checkpoint()  # checks the index before the tensors are dropped
        for file in files:
            self._held[file].tensors = None
        return taken

    def checkpoint(self) -> Checkpoint:
        """Open the listed files as a checkpoint; raises as `offsite.storage.checkpoint_folder.open_checkpoint`."""
        return checkpoint_of(self)

    def _of(self, name: str, *, hold: bool) -> ReadFile:
        """The listed file `name`, read again if what the caller needs is not in memory.

        With `hold` the caller needs its tensors, otherwise its content and header.

        Raises:
            FileNotFoundError: no listed file has that name.
            VerificationError: the file was read again, and has changed since it was hashed.
            StorageError: the file cannot be read.
        """
        listed = self._listed.get(name)
        if listed is None:
            raise FileNotFoundError(f"{self.folder / name} is not listed")
        held = self._held.get(name)
        if held is None or (hold and held.header is not None and held.tensors is None):
            held = self._held[name] = _read_again(self.folder / name, listed, hold=hold)
        return held


def _read_again(file: Path, listed: Written, *, hold: bool) -> ReadFile:
    """Read a file again, and compare its size and hash with those in the manifest.

    Args:
        file: the file's path.
        listed: the manifest's entry for the file.
        hold: whether the file's tensors remain in memory.

    Raises:
        VerificationError: the file has changed.
        StorageError: the file cannot be read.
    """
    try:
        found = read_file(file, hold=hold)
    except FileNotFoundError:
        raise _changed(file, "it is gone") from None
    except OSError as error:
        raise StorageError(
            f"cannot read {file}: {error.strerror}", next_step="check the folder and its disk"
        ) from error
    except OffsiteError as error:
        raise _changed(file, error.what) from None
    if not found.is_file(listed):
        raise _changed(file, "its bytes are not those that were signed")
    return found


def _changed(file: Path, reason: str) -> VerificationError:
    """The error for a file that changed after it was verified."""
    return VerificationError(
        f"{file} changed after it was verified",
        reasons=[reason],
        next_step="verify the folder again, and see to it that nobody writes to it meanwhile",
    )
