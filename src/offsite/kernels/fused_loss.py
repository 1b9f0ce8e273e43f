"""The loss of a causal language model on labelled tokens: the head runs on these tokens alone, a slice at a time.

With a vocabulary of 49,000 words the logits of a batch outweigh a small model many times over. So the body runs
without its head; hidden states are picked where a label is; and head, softmax and gradient are computed in chunks
that are gone before the next one. Where the head is frozen, as it is in every adapter, its own gradient is never made.
"""

from typing import Any

import torch

CHUNK_ELEMENTS = 2**25  # logits that exist at once: 64 MiB in bf16


def labelled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy through a head, in chunks; products in the weight's dtype, softmax in fp32.

    Args:
        hidden: states before the head, (L, H), in the weight's dtype.
        weight: of the head, (V, H); gets a gradient if it asks for one.
        targets: token ids, (L,).
        bias: of the head, (V,), or None; gets a gradient if it asks for one.
        cap: logits become cap * tanh(logits / cap), as in Gemma 2 (arXiv 2408.00118, section 2).
        chunk_elements: most logits that exist at once.

    Returns:
        The sum of nats (a scalar with a gradient in `hidden`) and each label's nats, (L,), both fp32.
    """
    rows = max(1, chunk_elements // weight.shape[0])
    total, nats = _LabelledCrossEntropy.apply(hidden, weight, bias, targets, cap, rows)  # type: ignore[no-untyped-call]
    return total, nats


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor
) -> torch.Tensor:
    logits = buffer[: len(hidden)]  # (C, V)
    if bias is None:
        return torch.mm(hidden, weight.T, out=logits)
    return torch.addmm(bias, hidden, weight.T, out=logits)


def _softmax(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, nats: torch.Tensor, *, slopes: bool
) -> None:
    """Write the labels' nats and, if asked, turn the logits (C, V) into d nats / d logits."""
    if logits.device.type == "cpu":
        from offsite.kernels.cpu.softmax import softmax_
    else:
        from offsite.kernels.reference_backend import softmax_
    softmax_(logits, targets, cap, nats, slopes=slopes)


class _LabelledCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        cap: float | None,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays, for gradcheck
        nats = torch.empty(len(targets), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        slopes = any(part is not None for part in (gradient, of_weight, of_bias))
        # one buffer for all chunks: pieces of this size that come and go are what a heap gets its holes from
        buffer = weight.new_empty(min(rows, len(targets)), weight.shape[0])
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            logits = _logits(hidden[part], weight, bias, buffer)  # (C, V)
            _softmax(logits, targets[part], cap, nats[part], slopes=slopes)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
            if of_weight is not None:
                of_weight += logits.T @ hidden[part]  # (V, H)
            if of_bias is not None:
                of_bias += logits.sum(dim=0, dtype=wide)  # (V,)
        ctx.save_for_backward(gradient, of_weight, of_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nats)
        return nats.sum(), nats

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = (
            saved if saved is None else saved * gradients[0].to(saved.dtype) for saved in ctx.saved_tensors
        )
        head = (part if part is None else part.to(ctx.dtype) for part in (weight, bias))
        return (hidden if hidden is None else hidden.to(ctx.dtype), *head, None, None, None)
