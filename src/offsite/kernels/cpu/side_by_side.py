"""Runs micro-batches side by side: each in its own thread, with an equal share of torch's CPU threads.

Threads that share every matrix product wait for one another thousands of times per pass, and all but one are idle in
operations that cannot be split or are too small. Threads with their own micro-batches wait only at the end of a step.
Results are used in the order of the micro-batches, so they do not depend on which one finishes first.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

import torch
from torch import nn

from offsite.kernels.cpu.cpu_features import has_tiles
from offsite.kernels.cpu.thread_dropout import OwnRandomness

G = TypeVar("G")
R = TypeVar("R")

_CHANGED_BY_LENGTH = ("dynamic", "longrope")  # kinds of rotary embeddings that a long sequence changes for all passes


def count(body: nn.Module, dtype: torch.dtype, asked: int | None, sample: Callable[[], object]) -> tuple[int, str]:
    """Decide how many micro-batches run side by side, and give the reason.

    Arguments as for `offsite.kernels.count_side_by_side`.
    """
    wanted = asked or usual_lanes(torch.get_num_threads(), dtype.itemsize)
    if wanted == 1:
        return 1, "asked for" if asked else "more pay where several threads have matrix tiles and compute in bf16"
    if not independent(body):
        return 1, "a long row changes the rotary embedding for all that run"
    if _draws(sample):
        return 1, "a block draws random numbers of the process, so their order would depend on the threads"
    return wanted, "asked for" if asked else "pays on matrix tiles in bf16"


def independent(body: nn.Module) -> bool:
    """Whether passes through a network do not change it, so that they can run at the same time."""
    kinds = (str(getattr(module, "rope_type", "")) for module in body.modules())
    return not any(word in kind for kind in kinds for word in _CHANGED_BY_LENGTH)


@torch.no_grad()
def _draws(sample: Callable[[], object]) -> bool:
    """Whether `sample`, which runs a forward pass, uses the random generator of the process, not that of its thread.

    The state of the process's generator is restored.
    """
    before = torch.get_rng_state()
    with OwnRandomness(0):
        sample()
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn


@contextlib.contextmanager
def micro_batch_runner(parameters: Sequence[nn.Parameter], count: int) -> Iterator["_Backward"]:
    """Context manager: runs `count` micro-batches side by side; see `offsite.kernels.micro_batch_runner`."""
    with Lanes(count) as lanes:
        yield _Backward(parameters, lanes)


@contextlib.contextmanager
def forward_runner(body: nn.Module) -> Iterator["Lanes"]:
    """Context manager: runs a function without gradients on several micro-batches side by side, if that is faster."""
    several = usual_lanes(torch.get_num_threads(), next(body.parameters()).dtype.itemsize)
    with Lanes(several if independent(body) else 1) as lanes:
        yield lanes


class _Backward:
    """Runs forward and backward passes side by side (a `MicroBatchRunner`).

    Each micro-batch has its own random numbers, so the gradients do not depend on how many run at once.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lanes: "Lanes") -> None:
        self._parameters, self._lanes = parameters, lanes

    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[torch.Tensor]:
        def alone(group: G) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
            loss = loss_of(group)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach(), [None] * len(self._parameters)

        def beside_others(group: G) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
            loss = loss_of(group)
            return loss.detach(), torch.autograd.grad(loss, self._parameters, allow_unused=True)

        for loss, gradients in self._lanes.run_seeded(alone if self._lanes.count == 1 else beside_others, groups):
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                _accumulate(parameter, gradient)
            del gradients  # free them before the next ones exist
            yield loss


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
    """Add a gradient to `.grad` of a parameter; None means that the loss does not depend on the parameter."""
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.clone()  # autograd may return one tensor for two parameters
    else:
        parameter.grad += gradient


class Lanes:
    """Context manager: `count` threads (lanes) that each use an equal share of torch's threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.count > 1:
            each = max(1, self._threads // self.count)
            self._pool = ThreadPoolExecutor(self.count, "lane", torch.set_num_threads, (each,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # a lane's call also set the number for threads started later

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        """Call `work` on each group; yields the results in the order of the groups.

        Groups that are too few to fill all lanes run at the end, one after the other, with all of torch's threads. At
        most `count` results exist at once, so the caller must use each result before it asks for the next.
        """
        side_by_side = len(groups) - len(groups) % self.count if self._pool is not None else 0
        waiting: deque[Future[R]] = deque()
        for group in groups[:side_by_side]:
            assert self._pool is not None
            waiting.append(self._pool.submit(work, group))
            if len(waiting) == self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        for group in groups[side_by_side:]:
            yield work(group)

    def run_seeded(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        """Call `work` on each group with random numbers of its own; yields the results in the order of the groups.

        The seeds come from torch's generator before any work starts, so they do not depend on which lane is faster.
        """

        def alone(one: tuple[G, int]) -> R:
            with OwnRandomness(one[1]):
                return work(one[0])

        seeds = torch.randint(2**62, (len(groups),)).tolist()
        return self(alone, list(zip(groups, seeds, strict=True)))


def usual_lanes(threads: int, item: int) -> int:
    """The number of micro-batches of text that a tuning runs side by side by default.

    It is 2 in bf16 on matrix tiles: there products are so fast that threads spend much time waiting for one another,
    and two lanes are faster by a third or more. Elsewhere two lanes gain almost nothing and need a tenth more memory
    (benchmarks/NOTES.md).

    Args:
        threads: the number of torch's threads in the tuning.
        item: bytes of one number in the compute dtype.
    """
    return min(2, threads) if item == 2 and has_tiles() else 1
