"""How micro-batches run: one after the other, or side by side where the device's backend says that it pays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import nn

from offsite.kernels.replacement_report import Piece

G = TypeVar("G")
R = TypeVar("R")

_NAME = "micro-batches side by side"


class MicroBatchRunner(Protocol):
    """Runs the micro-batches of an optimiser step forwards and backwards."""

    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[float]:
        """Run every micro-batch.

        Args:
            loss_of: the loss of a micro-batch, a scalar with a gradient; it may be called from several threads at once.
            groups: the micro-batches, in any form that `loss_of` takes.

        Yields:
            The loss of each micro-batch, in the order of the groups. Once it is yielded, that micro-batch's gradients
            have been added to `.grad` of the parameters, and those of no later one.
        """
        ...


class ForwardRunner(Protocol):
    """Runs work without gradients over micro-batches."""

    @property
    def count(self) -> int:
        """How many run at the same time."""
        ...

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        """What `work` returns for each micro-batch, in the order of the groups; it may run in several threads."""
        ...


def micro_batch_runner(
    parameters: Iterable[nn.Parameter], device: torch.device, count: int = 1
) -> AbstractContextManager[MicroBatchRunner]:
    """A runner of micro-batches, for as long as the context is open.

    Args:
        parameters: those that get gradients.
        device: where they are.
        count: how many micro-batches run at the same time, as `count_side_by_side` says; only on a CPU more than one.
            The gradients are the same for every count.
    """
    if device.type == "cpu":
        from offsite.kernels.cpu import side_by_side

        return side_by_side.micro_batch_runner(list(parameters), count)
    from offsite.kernels import reference_backend

    return reference_backend.micro_batch_runner()


def forward_runner(body: nn.Module) -> AbstractContextManager[ForwardRunner]:
    """A runner of passes without gradients through a network, for as long as the context is open."""
    if next(body.parameters()).device.type == "cpu":
        from offsite.kernels.cpu import side_by_side

        return side_by_side.forward_runner(body)
    from offsite.kernels import reference_backend

    return reference_backend.forward_runner()


def count_side_by_side(
    body: nn.Module,
    dtype: torch.dtype,
    *,
    asked: int | None,
    sample: Callable[[], object],
    only_one: str = "",
) -> Piece:
    """Decide how many micro-batches run side by side, and give the reason.

    Args:
        body: the network that they run through.
        dtype: the compute dtype.
        asked: how many the settings ask for; None is what usually pays.
        sample: a forward pass in training mode, to find out whether it draws random numbers of the whole process.
        only_one: a reason of the caller's why there can be no more than one; empty if there is none.
    """
    device = next(body.parameters()).device
    if device.type != "cpu":
        return Piece(_NAME, 1, f"one fills a {device.type} device")
    if only_one:
        return Piece(_NAME, 1, only_one)
    from offsite.kernels.cpu import side_by_side

    return Piece(_NAME, *side_by_side.count(body, dtype, asked, sample))
