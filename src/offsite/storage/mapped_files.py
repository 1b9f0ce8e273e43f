"""Maps the tensors of files into memory: they take memory only from their first use until they are released.

Mapped pages count as memory of the process, although the operating system can drop them. So a model larger than memory
can run, and its process still looks small, if each weight is released after its use. Torch-free.
"""

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from offsite.storage.safetensors_files import TensorRange
from offsite.storage.snapshot import HeldTensor


class MappedTensors:
    """Tensors whose bytes are mapped from their files, read-only; writing to one ends the process.

    Where the operating system cannot drop mapped pages on request (Windows), `release` does nothing.

    Args:
        tensors: the tensors in files that nobody writes to meanwhile.

    Raises:
        OSError: a file cannot be opened or mapped.
    """

    def __init__(self, tensors: Iterable[TensorRange]) -> None:
        listed = list(tensors)
        maps = {file: _mapped(file) for file in {tensor.file for tensor in listed}}
        found = sorted((np.frombuffer(one, np.uint8).ctypes.data, one) for one in maps.values())
        self._starts, self._maps = [start for start, _ in found], [one for _, one in found]
        self.tensors: Mapping[str, HeldTensor] = {
            one.name: HeldTensor(
                one.name, one.dtype, one.shape, memoryview(maps[one.file])[one.start : one.start + one.size]
            )
            for one in listed
        }

    def holds(self, address: int) -> bool:
        """Whether an address in memory is in one of the mapped files."""
        return self._place(address) is not None

    def release(self, address: int, size: int) -> None:
        """Drop the pages of `size` bytes from `address` on; they are read from the file again at their next use.

        Does nothing for an address that is not in a mapped file.
        """
        place = self._place(address)
        if place is None or not size or not hasattr(mmap, "MADV_DONTNEED"):
            return
        mapping, offset = self._maps[place], address - self._starts[place]
        start = offset - offset % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, start, min(offset + size, len(mapping)) - start)

    def _place(self, address: int) -> int | None:
        """The position of the map that contains an address; None if no map does."""
        place = bisect_right(self._starts, address) - 1
        inside = place >= 0 and address < self._starts[place] + len(self._maps[place])
        return place if inside else None


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
