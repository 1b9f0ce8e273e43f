"""The loss of a causal language model: its head runs only on the tokens that have a label, a chunk of them at a time.

With a vocabulary of 49,000 words, the logits of a batch need far more memory than a small model. So the backbone runs
without the head, the hidden states at labelled tokens are picked out, and head, softmax and gradient are computed in
chunks; the logits of one chunk are overwritten by the next. If the head is frozen, its gradient is never computed.
"""

from typing import Any

import torch

_CHUNK_ELEMENTS = 2**25  # logits that exist at once on a CPU: 64 MiB in bf16
_MORE_ELEMENTS = 2**27  # on other devices, which need larger products to be busy: 256 MiB in bf16


def labelled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
    *,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of a language model's head on L labelled tokens, one chunk of tokens at a time.

    Matrix products are in the dtype of the weight, the softmax is in fp32.

    Args:
        hidden: hidden states of the labelled tokens before the head, (L, H), in the dtype of `weight`.
        weight: the weight of the head, (V, H); gets a gradient if it requires one.
        targets: the labels, token ids, (L,).
        bias: the bias of the head, (V,), or None; gets a gradient if it requires one.
        cap: if given, logits become cap * tanh(logits / cap), as in Gemma 2 (arXiv 2408.00118, section 2).
        chunk_elements: the largest number of logits that exist at once; None means a number for the device.

    Returns:
        The sum of the labels' losses (a scalar with a gradient with respect to `hidden`), and the loss of each label,
        (L,); both in nats and fp32.
    """
    usual = _CHUNK_ELEMENTS if weight.device.type == "cpu" else _MORE_ELEMENTS
    rows = max(1, (chunk_elements or usual) // weight.shape[0])
    total, nats = _LabelledCrossEntropy.apply(hidden, weight, bias, targets, cap, rows)  # type: ignore[no-untyped-call]
    return total, nats


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor
) -> torch.Tensor:
    """Compute the logits (C, V) of a chunk of hidden states (C, H) in the first rows of `buffer`; `bias` None: none."""
    logits = buffer[: len(hidden)]  # (C, V)
    if bias is None:
        return torch.mm(hidden, weight.T, out=logits)
    return torch.addmm(bias, hidden, weight.T, out=logits)


def _softmax(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, nats: torch.Tensor, *, slopes: bool
) -> None:
    """Write each label's loss to `nats`; with `slopes`, also replace the logits (C, V) by the losses' gradient.

    Arguments as for `offsite.kernels.reference_backend.softmax_`.
    """
    if logits.device.type == "cpu":
        from offsite.kernels.cpu.softmax import softmax_
    else:
        from offsite.kernels.reference_backend import softmax_
    softmax_(logits, targets, cap, nats, slopes=slopes)


class _LabelledCrossEntropy(torch.autograd.Function):
    """Autograd function that computes the gradients in its forward pass, where it has each chunk's probabilities.

    `rows` is the number of tokens in a chunk; other arguments as for `labelled_cross_entropy`.
    """

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
        # one buffer for all chunks: allocating and freeing tensors of this size would fragment the heap
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
