"""Passes side by side: each in a thread of its own, which has its share of the processor's threads.

Two threads that share every product wait for one another thousands of times a pass, and what does not split, or too
small a product to split, keeps one of them idle. Two that have rows of their own meet once. Results are used in the
order in which the work was given, so they are the same whichever was done first.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

import torch
from torch import nn

from offsite.kernels.cpu.thread_dropout import OwnRandomness
from offsite.kernels.memory_formulas import usual_lanes

G = TypeVar("G")
R = TypeVar("R")

_SHIFTING = ("dynamic", "longrope")  # rotary embeddings that a pass may change for all others


def usual_lanes_of(body: nn.Module) -> int:
    """How many passes through a network run side by side, if nothing else is said."""
    weight = next(body.parameters())
    if weight.device.type != "cpu" or not independent(body):
        return 1
    return usual_lanes(torch.get_num_threads(), weight.dtype.itemsize)


def independent(body: nn.Module) -> bool:
    """Whether no pass through a network changes it for the others."""
    return not any(word in str(getattr(module, "rope_type", "")) for module in body.modules() for word in _SHIFTING)


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

    def run(self, work: Callable[[G], R], given: Sequence[G]) -> Iterator[R]:
        """What `work` makes of each, in order; what would leave lanes empty runs afterwards on all threads.

        No more is kept than there are lanes: a result is to be used up before the next is asked for.
        """
        side_by_side = len(given) - len(given) % self.count if self._pool is not None else 0
        waiting: deque[Future[R]] = deque()
        for one in given[:side_by_side]:
            assert self._pool is not None
            waiting.append(self._pool.submit(work, one))
            if len(waiting) == self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        for one in given[side_by_side:]:
            yield work(one)

    def run_seeded(self, work: Callable[[G], R], given: Sequence[G]) -> Iterator[R]:
        """As `run`; each has random numbers of its own, under a seed that torch's generator gives it here.

        Which lane is faster changes none of them.
        """

        def alone(one: tuple[G, int]) -> R:
            with OwnRandomness(one[1]):
                return work(one[0])

        seeds = torch.randint(2**62, (len(given),)).tolist()
        return self.run(alone, list(zip(given, seeds, strict=True)))
