"""Read and write one safetensors file by tensor name and byte range, with plain reads and without torch.

Files are not trusted: every header is checked before any byte of a tensor is used. Format:
https://huggingface.co/docs/safetensors (8 bytes length, JSON header, tensors without holes).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from offsite.errors import StorageError
from offsite.storage.files import Written, write_stream
from offsite.storage.regular_files import read_up_to
from offsite.storage.strict_json import strict_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F32", "BF16", "F16")
CHUNK_BYTES = 8 * 2**20  # bytes copied at once; a multiple of every item size
# the longest header that is read: 250,000 tensors; the reference implementation reads up to 100 MB
HEADER_BYTES = 32 * 10**6
_MOST_REASONS = 100  # problems that are listed for one file


class StoredTensor(Protocol):
    """A tensor whose bytes can be read chunk by chunk, from a file or from memory."""

    @property
    def name(self) -> str:
        """The tensor's name in its file."""

    @property
    def dtype(self) -> str:
        """The dtype by its safetensors name, such as "BF16"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""

    def raw(self) -> Iterator[bytes | memoryview]:
        """Yield the tensor's bytes in chunks of `CHUNK_BYTES`; only the last chunk can be shorter."""


@dataclass(frozen=True)
class TensorRange:
    """One tensor in a file: its name, dtype and shape, and `start`, the offset in the file of its first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def raw(self) -> Iterator[bytes]:
        """Yield the tensor's bytes in chunks of `CHUNK_BYTES`, by plain reads.

        Raises:
            StorageError: the file ends before the end of the tensor.
        """
        left = self.size
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                wanted = min(CHUNK_BYTES, left)
                chunk = stream.read(wanted)
                if len(chunk) < wanted:
                    raise broken_file(
                        self.file, [f"ends {left - len(chunk)} bytes before the end of tensor {self.name!r}"]
                    )
                left -= len(chunk)
                yield chunk

    def rows(self, rows: slice) -> "TensorRange":
        """The rows from `rows.start` to `rows.stop` of the first axis; a tensor without axes has one row."""
        row = self.size // max(1, (self.shape or (1,))[0])
        return replace(self, shape=(rows.stop - rows.start, *self.shape[1:]), start=self.start + rows.start * row)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write.

    `chunks` is called only when the tensor is written and yields its bytes, so that one tensor at a time is in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def read_header(file: Path) -> dict[str, TensorRange]:
    """The position of each tensor in a safetensors file, by name, after a check that the header fits the file exactly.

    Raises:
        StorageError: the file is missing or truncated, or its header is malformed; reasons list every problem.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return parse_header(file, read_header_bytes(file, stream, size)[8:], size)
    except OSError as error:
        what = f"cannot read {file}: {error.strerror}"
        raise StorageError(what, next_step="check that the file is there, and that you may read it") from error


def read_header_bytes(file: Path, stream: BinaryIO, size: int) -> bytes:
    """Read the header of a safetensors file: eight bytes with the length of the JSON, then the JSON.

    Args:
        file: the file's path, for errors.
        stream: the file, opened, at its start.
        size: the number of bytes in the file.

    Raises:
        StorageError: the header's length does not fit a file of this size, or is over the limit.
    """
    start = read_up_to(stream, 8)
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise broken_file(file, [f"header of {length} bytes in a file of {size}"])
    return start + read_up_to(stream, length)


def parse_header(file: Path, raw: bytes, size: int) -> dict[str, TensorRange]:
    """The position of each tensor that a header lists, by name, after a check that the header fits the file exactly.

    Args:
        file: the file's path.
        raw: the JSON of the header.
        size: the number of bytes in the file.

    Raises:
        StorageError: the header is malformed; reasons list every problem.
    """
    try:
        header = strict_json(raw)
    except ValueError as error:
        raise broken_file(file, [f"header is not JSON: {error}"]) from None
    if not isinstance(header, dict):
        raise broken_file(file, ["header is not a JSON object"])
    return _check_header(file, header, data_start=8 + len(raw), data_size=size - 8 - len(raw))


def _check_header(file: Path, header: dict[str, Any], *, data_start: int, data_size: int) -> dict[str, TensorRange]:
    """The position of each tensor that a parsed header lists, after a check that tensors fill the data without holes.

    Args:
        file: the file's path.
        header: the parsed JSON of the header.
        data_start: offset in the file of the first tensor's first byte.
        data_size: number of bytes from there to the end of the file.

    Raises:
        StorageError: the header is malformed; reasons list every problem.
    """
    reasons: list[str] = []
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorRange] = {}
    for name, entry in header.items():
        if len(reasons) > _MOST_REASONS:
            raise broken_file(file, reasons)
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                reasons.append("__metadata__ is not an object of strings")
            continue
        problem = _entry_problem(entry)
        if problem:
            reasons.append(f"tensor {name!r}: {problem}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorRange(name, entry["dtype"], tuple(entry["shape"]), file, data_start + begin)
        ranges.append((begin, end, name))
        if end - begin != tensors[name].size:
            reasons.append(f"tensor {name!r}: {end - begin} bytes, but its shape and dtype need {tensors[name].size}")
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected and len(reasons) <= _MOST_REASONS:
            reasons.append(f"tensor {name!r} starts at byte {begin}, expected {expected} (overlap or hole)")
        expected = end
    if expected != data_size:
        reasons.append(f"tensors take {expected} bytes, but the file holds {data_size} (truncated or padded)")
    if reasons:
        raise broken_file(file, reasons)
    return tensors


def _entry_problem(entry: object) -> str | None:
    """What is wrong with a tensor's entry in a header; None if nothing is."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "entry must have exactly dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_SIZE:
        return f"dtype {str(entry['dtype'])[:60]!r} is not one of {', '.join(ITEM_SIZE)}"
    for key, most in (("shape", 8), ("data_offsets", 2)):
        numbers = entry[key]
        if not isinstance(numbers, list) or len(numbers) > most:
            return f"{key} is malformed"
        if any(type(n) is not int or not 0 <= n < 2**56 for n in numbers):
            return f"{key} holds what is no size"
    if len(entry["data_offsets"]) != 2:
        return "data_offsets needs two numbers"
    return None


def read_chunks(tensor: StoredTensor, dtype: str | None = None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor, a few MiB at a time; if `dtype` ("F32", "BF16", "F16") is given, cast to it.

    Raises:
        StorageError: the file ends before the end of the tensor.
    """
    for chunk in tensor.raw():
        if dtype is None or dtype == tensor.dtype:
            yield chunk
        else:
            yield from_float32(to_float32(chunk, tensor.dtype), dtype).data.cast("B")


def read_float32(tensor: StoredTensor) -> "npt.NDArray[np.float32]":
    """Read a whole tensor of any float dtype as a float32 array of the same shape."""
    import numpy as np  # here, as verifying a bundle does not need it

    parts = [to_float32(chunk, tensor.dtype) for chunk in read_chunks(tensor)]
    flat = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return flat.reshape(tensor.shape)


def to_float32(content: bytes | memoryview, dtype: str) -> "npt.NDArray[np.float32]":
    """Convert the bytes of a tensor in `dtype` ("F32", "F16" or "BF16") to a flat float32 array, without loss."""
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(content, "<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return np.frombuffer(content, "<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise TypeError(f"{dtype} is not a float dtype of a weight")


def from_float32(values: "npt.NDArray[np.float32]", dtype: str) -> "npt.NDArray[Any]":
    """Round a float32 array to `dtype` (to nearest even, as torch does); "BF16" gives the bit patterns as uint16."""
    import numpy as np

    if dtype == "F32":
        return np.ascontiguousarray(values, "<f4")
    if dtype == "F16":
        with np.errstate(over="ignore"):  # too large values become infinity, as in torch; callers check for it
            return np.ascontiguousarray(values).astype("<f2")
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2", copy=False)
    raise TypeError(f"{dtype} is not a float dtype of a weight")


def finite(tensor: StoredTensor) -> bool:
    """Whether a float tensor contains neither NaN nor infinity."""
    import numpy as np

    return all(bool(np.isfinite(to_float32(chunk, tensor.dtype)).all()) for chunk in read_chunks(tensor))


def copied(tensor: StoredTensor, *, name: str | None = None, dtype: str | None = None) -> NewTensor:
    """A `NewTensor` that copies a stored tensor, under the name `name`, cast to `dtype` if it is a float tensor.

    None means the tensor's own name or dtype.
    """
    kind = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    return NewTensor(name or tensor.name, kind, tensor.shape, lambda: read_chunks(tensor, kind))


def from_array(name: str, values: "npt.NDArray[np.float32]", dtype: str) -> NewTensor:
    """A `NewTensor` that writes a float32 array, rounded to `dtype`."""
    return NewTensor(name, dtype, values.shape, lambda: [from_float32(values, dtype).tobytes()])


def write_safetensors(file: Path, tensors: Iterable[NewTensor]) -> Written:
    """Write a new safetensors file, one tensor after the other, so that one tensor at a time is in memory."""
    ordered = _in_file_order(tensors)

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(ordered)
        for tensor in ordered:
            yield from tensor.chunks()

    return write_stream(file, chunks())


def safetensors_bytes(tensors: Iterable[NewTensor]) -> int:
    """The size in bytes of the file that `write_safetensors` would write."""
    ordered = _in_file_order(tensors)
    return len(_header(ordered)) + sum(tensor.size for tensor in ordered)


def _in_file_order(tensors: Iterable[NewTensor]) -> list[NewTensor]:
    """The tensors in the order in which a file stores them."""
    # wide items first, as the reference implementation does: so every tensor starts at a multiple of its item size
    return sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor.dtype])


def _header(ordered: Iterable[NewTensor]) -> bytes:
    """The header of a safetensors file: 8 bytes with the JSON's length, then the JSON, padded to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        header[tensor.name] = entry
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def broken_file(file: Path, reasons: list[str]) -> StorageError:
    """Make the error for a file or folder that is not a valid checkpoint; `reasons` lists every problem."""
    return StorageError(
        f"{file} is not a sound safetensors checkpoint",
        reasons=reasons,
        next_step="fetch the file again; if it came from the other party, ask for it again",
    )
