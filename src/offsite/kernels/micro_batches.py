"""Runs micro-batches one after the other, or several at the same time if that is faster on the device's backend."""

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
    """Runs the forward and backward passes of the micro-batches of one optimiser step."""

    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[torch.Tensor]:
        """Run every micro-batch.

        Args:
            loss_of: computes the loss of a micro-batch, a scalar with a gradient; several threads may call it at once.
            groups: the micro-batches, in any form that `loss_of` accepts.

        Yields:
            The loss of each micro-batch, a scalar without a gradient, in the order of the groups. When it is yielded,
            the gradients of that micro-batch have been added to `.grad` of the parameters (on an accelerator, this is
            queued), and those of later micro-batches have not.
        """
        ...


class ForwardRunner(Protocol):
    """Runs a function without gradients over micro-batches."""

    @property
    def count(self) -> int:
        """The number of micro-batches that run at the same time."""
        ...

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        """Call `work` on each micro-batch, possibly in several threads; yields the results in the order of `groups`."""
        ...


def micro_batch_runner(
    parameters: Iterable[nn.Parameter], device: torch.device, count: int = 1
) -> AbstractContextManager[MicroBatchRunner]:
    """Make a `MicroBatchRunner` for training passes, as a context manager.

    Args:
        parameters: the parameters that get gradients.
        device: the device of the parameters.
        count: how many micro-batches run at the same time, from `count_side_by_side`; more than one only on a CPU. The
            gradients are the same for every count.
    """
    if device.type == "cpu":
        from offsite.kernels.cpu import side_by_side

        return side_by_side.micro_batch_runner(list(parameters), count)
    from offsite.kernels import reference_backend

    return reference_backend.micro_batch_runner()


def forward_runner(body: nn.Module) -> AbstractContextManager[ForwardRunner]:
    """Make a `ForwardRunner` for passes without gradients through the network `body`, as a context manager."""
    shared = any(hasattr(parameter, "device_mesh") for parameter in body.parameters())  # among processes, by FSDP
    if next(body.parameters()).device.type == "cpu" and not shared:
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
    """Decide how many micro-batches run side by side.

    Args:
        body: the network that they run through.
        dtype: the compute dtype.
        asked: the number in the settings; None means the number that is usually fastest.
        sample: runs a forward pass in training mode, to find out whether it uses the random generator of the whole
            process.
        only_one: the caller's reason why only one can run; empty if there is none.

    Returns:
        An entry for the report of the kernels: the number of micro-batches, and the reason.
    """
    device = next(body.parameters()).device
    if device.type != "cpu":
        return Piece(_NAME, 1, f"one fills a {device.type} device")
    if only_one:
        return Piece(_NAME, 1, only_one)
    from offsite.kernels.cpu import side_by_side

    return Piece(_NAME, *side_by_side.count(body, dtype, asked, sample))
