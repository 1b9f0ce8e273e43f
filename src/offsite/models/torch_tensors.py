"""Stored tensors as torch's."""

import torch

from offsite.storage.safetensors_files import TensorRange, read_chunks

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensor(tensor: TensorRange, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of a checkpoint on the processor, by plain reads, cast to `dtype` if given.

    Raises:
        StorageError: the file ends early.
    """
    content = bytearray(tensor.size)
    filled = 0
    for chunk in read_chunks(tensor):
        content[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    kind = TORCH_DTYPES[tensor.dtype]
    flat = torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)
    return flat.reshape(tensor.shape).to(dtype or kind)
