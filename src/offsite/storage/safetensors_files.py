"""Safetensors read and written by tensor name and byte range, with plain reads and without torch.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Files may come
from a stranger: every header is checked before a byte of a tensor is used. Format:
https://huggingface.co/docs/safetensors (8 bytes length, JSON header, tensors without holes).
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from offsite.errors import StorageError
from offsite.storage.files import Written, write_stream
from offsite.storage.regular_files import read_up_to

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F32", "BF16", "F16")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DECLARED_WEIGHTS = "offsite-model.safetensors"  # of models that transformers does not know, and must not half load
DECLARED_INDEX = "offsite-model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
CHUNK_BYTES = 8 * 2**20  # bytes copied at once; a multiple of every item size
HEADER_BYTES = (
    32 * 10**6
)  # the longest header that is read: 250,000 tensors; the reference implementation reads up to 100 MB
_MOST_REASONS = 100  # against one file
_MOST_DIGITS = 40
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")


class StoredTensor(Protocol):
    """A tensor by its bytes: in a file, or read from one before."""

    @property
    def name(self) -> str:
        """Under which it is stored."""

    @property
    def dtype(self) -> str:
        """As safetensors calls it, such as "BF16"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def size(self) -> int:
        """Bytes."""

    def raw(self) -> Iterator[bytes | memoryview]:
        """Its bytes, a few MiB at a time; every chunk but the last has `CHUNK_BYTES`."""


@dataclass(frozen=True)
class TensorRange:
    """Where one tensor lies: file, first byte, and what it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def raw(self) -> Iterator[bytes]:
        """Its bytes, by plain reads.

        Raises:
            StorageError: the file ends early.
        """
        left = self.size
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                wanted = min(CHUNK_BYTES, left)
                chunk = stream.read(wanted)
                if len(chunk) < wanted:
                    raise _broken(self.file, [f"ends {left - len(chunk)} bytes before the end of tensor {self.name!r}"])
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `chunks` yields its bytes when its turn comes, so no more than one is in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def read_header(file: Path) -> dict[str, TensorRange]:
    """The tensors of one safetensors file, by name, after checking that the header describes the file exactly.

    Raises:
        StorageError: the file is missing, truncated, or its header is malformed; reasons list all that is wrong.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return parse_header(file, read_header_bytes(file, stream, size)[8:], size)
    except OSError as error:
        what = f"cannot read {file}: {error.strerror}"
        raise StorageError(what, next_step="check that the folder is complete") from error


def read_header_bytes(file: Path, stream: BinaryIO, size: int) -> bytes:
    """What stands before the tensors: eight bytes of length, and the JSON.

    Args:
        file: its path, for errors.
        stream: the file, open at its start.
        size: bytes in the file.

    Raises:
        StorageError: the length cannot be that of a header in a file of this size.
    """
    start = read_up_to(stream, 8)
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise _broken(file, [f"header of {length} bytes in a file of {size}"])
    return start + read_up_to(stream, length)


def parse_header(file: Path, raw: bytes, size: int) -> dict[str, TensorRange]:
    """The tensors that a header describes, by name, after checking that it describes the file exactly.

    Args:
        file: where the tensors lie.
        raw: the JSON.
        size: bytes in the file.

    Raises:
        StorageError: the header is malformed; reasons list all that is wrong.
    """
    try:
        header = strict_json(raw)
    except ValueError as error:
        raise _broken(file, [f"header is not JSON: {error}"]) from None
    if not isinstance(header, dict):
        raise _broken(file, ["header is not a JSON object"])
    return _check_header(file, header, data_start=8 + len(raw), data_size=size - 8 - len(raw))


def _check_header(file: Path, header: dict[str, Any], *, data_start: int, data_size: int) -> dict[str, TensorRange]:
    reasons: list[str] = []
    ranges: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorRange] = {}
    for name, entry in header.items():
        if len(reasons) > _MOST_REASONS:
            raise _broken(file, reasons)
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                reasons.append("__metadata__ is no object of strings")
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
        raise _broken(file, reasons)
    return tensors


def _entry_problem(entry: object) -> str | None:
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


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors, opened: its tensors by the names in the files."""

    folder: Path
    tensors: Mapping[str, TensorRange]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


class FolderFiles(Protocol):
    """The files of a folder of safetensors: on the disk, or as they were read from it before."""

    @property
    def folder(self) -> Path:
        """Where they lie, for errors and for the ranges of tensors."""

    def names(self) -> Set[str]:
        """Of all files."""

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is larger than any small file.
        """

    def header(self, name: str) -> dict[str, TensorRange]:
        """The tensors of a safetensors file, as `read_header`."""


@dataclass(frozen=True)
class _OnDisk:
    folder: Path

    def names(self) -> Set[str]:
        return {path.name for path in self.folder.iterdir() if path.is_file()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        with (self.folder / name).open("rb") as stream:
            content = stream.read(HEADER_BYTES + 1)
        if len(content) > HEADER_BYTES:
            raise ValueError(f"over {HEADER_BYTES} bytes")
        return content

    def header(self, name: str) -> dict[str, TensorRange]:
        return read_header(self.folder / name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with `model.safetensors` or shards with an index; nothing but headers is read.

    Raises:
        StorageError: no weights, a missing, outside or truncated file, an index that disagrees with its files, or one
            beside weights that it does not name, of which every reader would take others.
    """
    return checkpoint_of(_OnDisk(folder))


def checkpoint_of(files: FolderFiles) -> Checkpoint:
    """The checkpoint that files make; raises as `open_checkpoint`."""
    folder, names = files.folder, files.names()
    for weights, index in ((WEIGHTS, INDEX), (DECLARED_WEIGHTS, DECLARED_INDEX)):
        if index in names:
            checkpoint = _sharded(files, index)
            named = {tensor.file.name for tensor in checkpoint.tensors.values()}
            if weights in names and named != {weights}:
                raise _broken(folder, [f"{weights} and {index} lie side by side, and the index names other files"])
            return checkpoint
        if weights in names:
            return Checkpoint(folder, files.header(weights))
    raise StorageError(
        f"{folder} holds no {WEIGHTS} and no {INDEX}",
        reasons=[f"found: {', '.join(sorted(names)[:12]) or 'nothing'}"]
        if folder.is_dir()
        else [f"{folder} is no folder"],
        next_step="turn other formats into a base folder with `offsite import MODEL --out base/`",
    )


def _sharded(files: FolderFiles, name_of_index: str) -> Checkpoint:
    index = files.folder / name_of_index
    try:
        weight_map = strict_json(files.read(name_of_index))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(index, [f"no readable weight_map: {error}"]) from None
    shards = sorted(set(entries.values()))
    outside = [name for name in shards if not _SHARD_NAME.fullmatch(name)]
    if outside:
        raise _broken(index, [f"names {name!r}, expected a plain file name in the same folder" for name in outside])
    missing = [name for name in shards if name not in files.names()]
    if missing:
        raise _broken(index, [f"names {name}, which is not there" for name in missing])
    tensors: dict[str, TensorRange] = {}
    reasons = []
    for name in shards:
        held = files.header(name)
        listed = {tensor for tensor, file in entries.items() if file == name}
        reasons += [f"lists {tensor!r} in {name}, which does not hold it" for tensor in sorted(listed - set(held))]
        reasons += [f"does not list {tensor!r} in {name}" for tensor in sorted(set(held) - listed)]
        tensors |= held
    if reasons:
        raise _broken(index, reasons)
    return Checkpoint(files.folder, tensors)


def read_chunks(tensor: StoredTensor, dtype: str | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, a few MiB at a time, cast to `dtype` ("F32", "BF16", "F16") on the way.

    Raises:
        StorageError: the file ends early.
    """
    for chunk in tensor.raw():
        if dtype is None or dtype == tensor.dtype:
            yield chunk
        else:
            yield from_float32(to_float32(chunk, tensor.dtype), dtype).data.cast("B")


def read_float32(tensor: StoredTensor) -> "npt.NDArray[np.float32]":
    """A whole float tensor as float32, in its shape."""
    import numpy as np  # verifying a bundle does without

    parts = [to_float32(chunk, tensor.dtype) for chunk in read_chunks(tensor)]
    flat = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return flat.reshape(tensor.shape)


def to_float32(content: bytes | memoryview, dtype: str) -> "npt.NDArray[np.float32]":
    """Bytes of a float dtype as float32, exactly."""
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(content, "<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return np.frombuffer(content, "<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    raise TypeError(f"{dtype} is no float dtype of a weight")


def from_float32(values: "npt.NDArray[np.float32]", dtype: str) -> "npt.NDArray[Any]":
    """Float32 rounded once, to nearest even, as torch does; bfloat16 comes as its 16 bits (uint16)."""
    import numpy as np

    if dtype == "F32":
        return np.ascontiguousarray(values, "<f4")
    if dtype == "F16":
        with np.errstate(over="ignore"):  # becomes infinity, as in torch; whoever minds looks at the result
            return np.ascontiguousarray(values).astype("<f2")
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2", copy=False)
    raise TypeError(f"{dtype} is no float dtype of a weight")


def finite(tensor: StoredTensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity."""
    import numpy as np

    return all(bool(np.isfinite(to_float32(chunk, tensor.dtype)).all()) for chunk in read_chunks(tensor))


def copied(tensor: StoredTensor, *, name: str | None = None, dtype: str | None = None) -> NewTensor:
    """A tensor of a checkpoint as one to be written, under another name or dtype if wanted."""
    kind = dtype if dtype and tensor.dtype in FLOATS else tensor.dtype
    return NewTensor(name or tensor.name, kind, tensor.shape, lambda: read_chunks(tensor, kind))


def from_array(name: str, values: "npt.NDArray[np.float32]", dtype: str) -> NewTensor:
    """A float32 array as a tensor to be written in `dtype`."""
    return NewTensor(name, dtype, values.shape, lambda: [from_float32(values, dtype).tobytes()])


def write_safetensors(file: Path, tensors: Iterable[NewTensor]) -> Written:
    """Write one new safetensors file, streaming tensor by tensor."""
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
    # wide items first, as the reference implementation does: so every tensor starts at a multiple of its item size
    return sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor.dtype])


def _header(ordered: Iterable[NewTensor]) -> bytes:
    """What stands before the tensors: the length of the JSON, and the JSON padded to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        header[tensor.name] = entry
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_checkpoint(
    folder: Path, tensors: Iterable[NewTensor], shard_bytes: int = SHARD_BYTES, weights: str = WEIGHTS
) -> list[Written]:
    """Write `model.safetensors`, or shards and their index where one file would be over `shard_bytes`."""
    shards = _shards(tensors, shard_bytes, weights)
    written = [write_safetensors(folder / name, shard) for name, shard in shards.items()]
    return written if len(shards) == 1 else [*written, write_stream(folder / f"{weights}.index.json", [_index(shards)])]


def checkpoint_bytes(
    tensors: Iterable[NewTensor], shard_bytes: int = SHARD_BYTES, weights: str = WEIGHTS
) -> dict[str, int]:
    """The files that `write_checkpoint` would write, by name, with their sizes in bytes."""
    shards = _shards(tensors, shard_bytes, weights)
    sizes = {name: safetensors_bytes(shard) for name, shard in shards.items()}
    return sizes if len(shards) == 1 else {**sizes, f"{weights}.index.json": len(_index(shards))}


def _shards(tensors: Iterable[NewTensor], shard_bytes: int, weights: str) -> dict[str, list[NewTensor]]:
    """The tensors of each file, by the file's name."""
    shards: list[list[NewTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.size
    if len(shards) == 1:
        return {weights: shards[0]}
    stem = weights.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Iterable[NewTensor]]) -> bytes:
    index = {
        "metadata": {"total_size": sum(t.size for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }
    return json.dumps(index, indent=1).encode()


def strict_json(raw: bytes) -> Any:
    """JSON in which a key that appears twice, or NaN, is an error (a second reader might take the other one).

    Nor may an integer be longer than any that is met: tokenizers write 10^30 for "no limit".
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def sensible(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:  # int and float have limits, and a product of several would be over them
            raise ValueError(f"{digits[:20]}... has {len(digits)} digits")
        return int(digits)

    def in_range(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):  # 1e999 is JSON, and would come out as infinity
            raise ValueError(f"{digits[:20]} is out of range")
        return value

    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=no_twins,
            parse_constant=no_constant,
            parse_float=in_range,
            parse_int=sensible,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _broken(file: Path, reasons: list[str]) -> StorageError:
    return StorageError(
        f"{file} is not a sound safetensors checkpoint",
        reasons=reasons,
        next_step="fetch the file again; if it came from the other party, ask for it again",
    )
