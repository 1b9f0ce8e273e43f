"""The backend in plain torch, for devices without a backend of their own: it replaces no modules."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from offsite.models.backbone import capped

G = TypeVar("G")
R = TypeVar("R")


@contextlib.contextmanager
def micro_batch_runner() -> Iterator["_Backward"]:
    """Context manager: runs micro-batches one after the other; see `offsite.kernels.micro_batch_runner`."""
    yield _Backward()


@contextlib.contextmanager
def forward_runner() -> Iterator["_Forward"]:
    """Context manager: runs a function without gradients on one micro-batch after the other."""
    yield _Forward()


def softmax_(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, nats: torch.Tensor, *, slopes: bool
) -> None:
    """Write each label's loss to `nats`; with `slopes`, also replace the logits in place by the losses' gradient.

    Args:
        logits: (L, V). The function allocates one or two more tensors of this size, in the dtype of `nats`.
        targets: the labels, (L,).
        cap: if given, logits become cap * tanh(logits / cap); None: they remain as they are.
        nats: the output, (L,), the loss of each label in nats; fp32 or float64.
        slopes: whether the logits are replaced by their gradient.
    """
    labels = targets[:, None]  # (L, 1)
    bounded = capped(logits, cap)  # (L, V)
    log_probabilities = torch.log_softmax(bounded, dim=-1, dtype=nats.dtype)
    nats.copy_(-log_probabilities.gather(1, labels)[:, 0])
    if not slopes:
        return
    slope = log_probabilities.exp_()  # d nats / d capped = probability - 1 at the target
    slope.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=slope.dtype))
    if cap is not None:
        slope *= 1 - (bounded / cap).square()  # d capped / d logits
    logits.copy_(slope)


class _Backward:
    """Runs the forward and backward pass of one micro-batch after the other (a `MicroBatchRunner`)."""

    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[torch.Tensor]:
        for group in groups:
            loss = loss_of(group)
            loss.backward()  # type: ignore[no-untyped-call]
            yield loss.detach()  # no number, for which the CPU would have to wait for an accelerator


class _Forward:
    """Runs a function on one micro-batch after the other (a `ForwardRunner`)."""

    count = 1

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        return map(work, groups)
