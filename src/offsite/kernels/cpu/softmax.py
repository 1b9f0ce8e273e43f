"""The softmax of the loss on a CPU: a compiled kernel for bf16, otherwise torch on slices that fit into the cache."""

import torch

from offsite.kernels import reference_backend
from offsite.kernels.cpu import compiled_kernels as compiled

SLICE_ELEMENTS = 2**19  # the number of logits of a slice: 2 MiB in fp32


def softmax_(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, nats: torch.Tensor, *, slopes: bool
) -> None:
    """Write each label's loss to `nats`; with `slopes`, also replace the logits in place by the losses' gradient.

    Arguments as for `offsite.kernels.reference_backend.softmax_`.
    """
    if cap is None and compiled.activates(logits) and nats.dtype == torch.float32:
        compiled.softmax_(logits, targets.contiguous(), nats, slopes=slopes)
        return
    rows = max(1, SLICE_ELEMENTS // logits.shape[1])
    for begin in range(0, len(targets), rows):
        part = slice(begin, begin + rows)
        reference_backend.softmax_(logits[part], targets[part], cap, nats[part], slopes=slopes)
