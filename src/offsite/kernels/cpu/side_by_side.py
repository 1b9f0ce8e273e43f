"""Runs micro-batches side by side: each in its own thread, with its share of the CPU's threads.

Two threads that share every product wait for one another thousands of times a pass, and what does not split, or too
small a product to split, keeps one of them idle. Two that have rows of their own meet once. Results are used in the
order of the work, so they are the same whichever was done first.
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

_CHANGED_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that a long row changes for all other passes


def count(body: nn.Module, dtype: torch.dtype, asked: int | None, sample: Callable[[], object]) -> tuple[int, str]:
    """Decide how many micro-batches run side by side, and why; see `offsite.kernels.count_side_by_side`."""
    wanted = asked or usual_lanes(torch.get_num_threads(), dtype.itemsize)
    if wanted == 1:
        return 1, "asked for" if asked else "more pay where several threads have matrix tiles and compute in bf16"
    if not independent(body):
        return 1, "a long row changes the rotary embedding for all that run"
    if _draws(sample):
        return 1, "a block draws random numbers of the process, so their order would depend on the threads"
    return wanted, "asked for" if asked else "pays on matrix tiles in bf16"


def independent(body: nn.Module) -> bool:
    """Whether no pass through a network changes it for the others."""
    kinds = (str(getattr(module, "rope_type", "")) for module in body.modules())
    return not any(word in kind for kind in kinds for word in _CHANGED_BY_LENGTH)


@torch.no_grad()
def _draws(sample: Callable[[], object]) -> bool:
    """Whether a pass draws random numbers of the process and not of its micro-batch; they are put back."""
    before = torch.get_rng_state()
    with OwnRandomness(0):
        sample()
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn


@contextlib.contextmanager
def micro_batch_runner(parameters: Sequence[nn.Parameter], count: int) -> Iterator["_Backward"]:
    """Runs micro-batches, so many side by side; see `offsite.kernels.micro_batch_runner`."""
    with Lanes(count) as lanes:
        yield _Backward(parameters, lanes)


@contextlib.contextmanager
def forward_runner(body: nn.Module) -> Iterator["Lanes"]:
    """Runs work without gradients, as many micro-batches side by side as usually pays."""
    several = usual_lanes(torch.get_num_threads(), next(body.parameters()).dtype.itemsize)
    with Lanes(several if independent(body) else 1) as lanes:
        yield lanes


class _Backward:
    """Each micro-batch has random numbers of its own, so the gradients do not depend on how many run at once."""

    def __init__(self, parameters: Sequence[nn.Parameter], lanes: "Lanes") -> None:
        self._parameters, self._lanes = parameters, lanes

    def __call__(self, loss_of: Callable[[G], torch.Tensor], groups: Sequence[G]) -> Iterator[float]:
        def alone(group: G) -> tuple[float, Sequence[torch.Tensor | None]]:
            loss = loss_of(group)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach()), [None] * len(self._parameters)

        def beside_others(group: G) -> tuple[float, Sequence[torch.Tensor | None]]:
            loss = loss_of(group)
            return float(loss.detach()), torch.autograd.grad(loss, self._parameters, allow_unused=True)

        for loss, gradients in self._lanes.run_seeded(alone if self._lanes.count == 1 else beside_others, groups):
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                _accumulate(parameter, gradient)
            del gradients  # before the next ones are there
            yield loss


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.clone()  # two parameters may have been given one tensor
    else:
        parameter.grad += gradient


class Lanes:
    """So many threads, for as long as this is open."""

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
            torch.set_num_threads(self._threads)  # a lane's number became that of threads to come

    def __call__(self, work: Callable[[G], R], groups: Sequence[G]) -> Iterator[R]:
        """What `work` makes of each, in order; what would leave lanes empty runs afterwards on all threads.

        No more is kept than there are lanes: a result is to be used up before the next is asked for.
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
        """As a call; each has random numbers of its own, under a seed that torch's generator gives it here.

        Which lane is faster changes none of them.
        """

        def alone(one: tuple[G, int]) -> R:
            with OwnRandomness(one[1]):
                return work(one[0])

        seeds = torch.randint(2**62, (len(groups),)).tolist()
        return self(alone, list(zip(groups, seeds, strict=True)))


def usual_lanes(threads: int, item: int) -> int:
    """How many micro-batches of text a tuning runs side by side unless told.

    Two where products are so cheap that what threads wait for in a shared one counts, in bf16 on matrix tiles: a third
    or more faster. Elsewhere they gain next to nothing and hold a tenth more (benchmarks/NOTES.md).

    Args:
        threads: of the tuning.
        item: bytes of a number in the arithmetic.
    """
    return min(2, threads) if item == 2 and has_tiles() else 1
