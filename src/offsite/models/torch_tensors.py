"""Reads stored tensors as torch tensors."""

import warnings

import torch

from offsite.storage.safetensors_files import StoredTensor, read_chunks
from offsite.storage.snapshot import HeldTensor

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(tensor: StoredTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read a stored tensor into CPU memory, cast to `dtype` if given.

    A `HeldTensor` is already in memory and is copied only if it is cast. Without a cast, the result shares its memory,
    so writing to one changes the other; if it is mapped read-only from a file, writing ends the process.

    Raises:
        StorageError: the file ends before the end of the tensor.
    """
    content = tensor.content if isinstance(tensor, HeldTensor) else _content(tensor)
    kind = TORCH_DTYPES[tensor.dtype]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # nothing writes to weights
        flat = torch.frombuffer(content, dtype=kind) if len(content) else torch.empty(0, dtype=kind)
    return flat.reshape(tensor.shape).to(dtype or kind)


def _content(tensor: StoredTensor) -> bytearray:
    """The bytes of a stored tensor, read into memory."""
    content = bytearray(tensor.size)
    filled = 0
    for chunk in read_chunks(tensor):
        content[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return content
