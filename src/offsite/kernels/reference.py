"""The backend of plain torch: everything runs as its library wrote it. For devices without a backend of their own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

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
