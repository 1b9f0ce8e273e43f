"""The backend of plain torch: every module runs as its library wrote it. For devices without their own backend."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from offsite.models.backbone import capped

G = TypeVar("G")
R = TypeVar("R")


@contextlib.contextmanager
def micro_batch_runner() -> Iterator["_Backward"]:
    """Runs micro-batches one after the other; see `offsite.kernels.micro_batch_runner`."""
    yield _Backward()


@contextlib.contextmanager
def forward_runner() -> Iterator["_Forward"]:
    """Runs work without gradients, one micro-batch after the other."""
    yield _Forward()


def softmax_(
    logits: torch.Tensor, targets: torch.Tensor, cap: float | None, nats: torch.Tensor, *, slopes: bool
) -> None:
    """Write each label's nats and, if asked, turn the logits into d nats / d logits in place.

    Args:
        logits: (L, V); beside them this takes as many numbers again, in the dtype of `nats`.
        targets: the labels, (L,).
        cap: logits become cap * tanh(logits / cap); None where they do not.
        nats: (L,), fp32 or wider; what is written.
        slopes: whether the logits become their gradient.
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
    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[float]:
        for group in groups:
            loss = loss_of(group)
            loss.backward()  # type: ignore[no-untyped-call]
            yield float(loss.detach())  # behind the backward pass: on a device this waits for it


class _Forward:
    count = 1

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        return map(work, groups)
