"""Finds NaN and infinity in tensors while they are written, so that no byte is read twice. Torch-free."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from offsite.storage.safetensors_files import NewTensor

# For each float dtype: its size in bytes, and the bits that are all set in NaN and infinity and in no other value.
_EXPONENTS = {
    "F64": (8, 0x7FF0000000000000),
    "F32": (4, 0x7F800000),
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # it has no infinity, and its NaN has all bits set
}

_PIECE = 2**16  # values looked at together: they fit in the CPU's cache


def has_non_finite(content: bytes | memoryview, dtype: str) -> bool:
    """Whether the bytes of a tensor with this safetensors dtype contain NaN or infinity; False for integers."""
    import numpy as np  # here, as verifying a bundle does not need it

    if dtype not in _EXPONENTS:
        return False
    size, mask = _EXPONENTS[dtype]
    bits = np.frombuffer(content, f"<u{size}")
    pieces = (bits[start : start + _PIECE] for start in range(0, bits.size, _PIECE))
    return any(int((piece & bits.dtype.type(mask)).max()) == mask for piece in pieces)


@dataclass
class FiniteWatch:
    """Searches tensors for NaN and infinity while they are written; `found` lists the names of those that have any."""

    found: list[str] = field(default_factory=list)

    def over(self, tensors: Iterable[NewTensor]) -> list[NewTensor]:
        """Wrap tensors so that they are searched when they are written; their bytes remain the same."""
        return [replace(tensor, chunks=partial(self._chunks, tensor)) for tensor in tensors]

    def _chunks(self, tensor: NewTensor) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a tensor, and add its name to `found` if they contain NaN or infinity."""
        for chunk in tensor.chunks():
            if has_non_finite(chunk, tensor.dtype) and tensor.name not in self.found:
                self.found.append(tensor.name)
            yield chunk
