"""Open and write a checkpoint: a folder with `model.safetensors`, or with shards and their index. Torch-free."""

import json
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from offsite.errors import StorageError
from offsite.storage import safetensors_files
from offsite.storage.files import Written, write_stream
from offsite.storage.safetensors_files import (
    NewTensor,
    TensorRange,
    broken_file,
    read_header,
    safetensors_bytes,
    write_safetensors,
)
from offsite.storage.strict_json import strict_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# for models with declared modules: transformers does not know those, and must not load a part of the weights
DECLARED_WEIGHTS = "offsite-model.safetensors"
DECLARED_INDEX = "offsite-model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder of which the safetensors headers were read, but no weights.

    `tensors` has the dtype, shape and byte position of every tensor, by tensor name.
    """

    folder: Path
    tensors: Mapping[str, TensorRange]

    @property
    def size(self) -> int:
        """The number of bytes of all tensors together."""
        return sum(tensor.size for tensor in self.tensors.values())


class FolderFiles(Protocol):
    """Read access to the files of a checkpoint folder.

    An implementation reads them from the disk on each call, or returns what it read into memory earlier.
    """

    @property
    def folder(self) -> Path:
        """The folder's path, for errors and for the positions of tensors."""

    def names(self) -> Set[str]:
        """The names of all files in the folder."""

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is too large to be a JSON file of a checkpoint.
        """

    def header(self, name: str) -> dict[str, TensorRange]:
        """The position of each tensor in the safetensors file `name`, by tensor name; raises as `read_header`."""


@dataclass(frozen=True)
class _OnDisk:
    """`FolderFiles` that reads from the disk on each call."""

    folder: Path

    def names(self) -> Set[str]:
        return {path.name for path in self.folder.iterdir() if path.is_file()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        with (self.folder / name).open("rb") as stream:
            content = stream.read(safetensors_files.HEADER_BYTES + 1)
        if len(content) > safetensors_files.HEADER_BYTES:
            raise ValueError(f"over {safetensors_files.HEADER_BYTES} bytes")
        return content

    def header(self, name: str) -> dict[str, TensorRange]:
        return read_header(self.folder / name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder with `model.safetensors`, or with shards and an index; only headers are read.

    Raises:
        StorageError: there are no weights; a file is missing, truncated or outside the folder; the index disagrees
            with its files; or there is an index and also a weights file that it does not name, so that readers could
            load different weights.
    """
    return checkpoint_of(_OnDisk(folder))


def checkpoint_of(files: FolderFiles) -> Checkpoint:
    """Open the checkpoint that consists of these files; only headers are read. Raises as `open_checkpoint`."""
    folder, names = files.folder, files.names()
    for weights, index in ((WEIGHTS, INDEX), (DECLARED_WEIGHTS, DECLARED_INDEX)):
        if index in names:
            checkpoint = _sharded(files, index)
            named = {tensor.file.name for tensor in checkpoint.tensors.values()}
            if weights in names and named != {weights}:
                raise broken_file(folder, [f"{weights} and {index} lie side by side, and the index names other files"])
            return checkpoint
        if weights in names:
            return Checkpoint(folder, files.header(weights))
    raise StorageError(
        f"{folder} holds no {WEIGHTS} and no {INDEX}",
        reasons=[f"found: {', '.join(sorted(names)[:12]) or 'nothing'}"]
        if folder.is_dir()
        else [f"{folder} is not a folder"],
        next_step="turn other formats into a base folder with `offsite import MODEL --out base/`",
    )


def _sharded(files: FolderFiles, name_of_index: str) -> Checkpoint:
    """Open a checkpoint in shards, after a check that the index file and the shards' headers list the same tensors."""
    index = files.folder / name_of_index
    try:
        weight_map = strict_json(files.read(name_of_index))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken_file(index, [f"no readable weight_map: {error}"]) from None
    shards = sorted(set(entries.values()))
    outside = [name for name in shards if not _SHARD_NAME.fullmatch(name)]
    if outside:
        raise broken_file(index, [f"names {name!r}, expected a plain file name in the same folder" for name in outside])
    missing = [name for name in shards if name not in files.names()]
    if missing:
        raise broken_file(index, [f"names {name}, which is not there" for name in missing])
    tensors: dict[str, TensorRange] = {}
    reasons = []
    for name in shards:
        held = files.header(name)
        listed = {tensor for tensor, file in entries.items() if file == name}
        reasons += [f"lists {tensor!r} in {name}, which does not hold it" for tensor in sorted(listed - set(held))]
        reasons += [f"does not list {tensor!r} in {name}" for tensor in sorted(set(held) - listed)]
        tensors |= held
    if reasons:
        raise broken_file(index, reasons)
    return Checkpoint(files.folder, tensors)


def write_checkpoint(
    folder: Path, tensors: Iterable[NewTensor], shard_bytes: int = SHARD_BYTES, weights: str = WEIGHTS
) -> list[Written]:
    """Write the tensors to the file `weights`, or to shards with an index if they take more than `shard_bytes`.

    Returns the name, size and SHA-256 of each written file.
    """
    shards = _shards(tensors, shard_bytes, weights)
    written = [write_safetensors(folder / name, shard) for name, shard in shards.items()]
    return written if len(shards) == 1 else [*written, write_stream(folder / f"{weights}.index.json", [_index(shards)])]


def checkpoint_bytes(
    tensors: Iterable[NewTensor], shard_bytes: int = SHARD_BYTES, weights: str = WEIGHTS
) -> dict[str, int]:
    """The size in bytes of each file that `write_checkpoint` would write, by file name; arguments as for it."""
    shards = _shards(tensors, shard_bytes, weights)
    sizes = {name: safetensors_bytes(shard) for name, shard in shards.items()}
    return sizes if len(shards) == 1 else {**sizes, f"{weights}.index.json": len(_index(shards))}


def _shards(tensors: Iterable[NewTensor], shard_bytes: int, weights: str) -> dict[str, list[NewTensor]]:
    """Divide tensors among files of at most `shard_bytes` (a larger tensor has its own file), by file name.

    `weights` is the name of the file if one is enough; the names of shards are derived from it.
    """
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
    """The content of the index file: the file name of each tensor, and the total size in bytes."""
    index = {
        "metadata": {"total_size": sum(t.size for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }
    return json.dumps(index, indent=1).encode()
