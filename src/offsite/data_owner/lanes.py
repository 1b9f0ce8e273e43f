"""Micro-batches side by side: each in a thread of its own, which has its share of the processor's threads.

Two threads that share every product wait for one another thousands of times a step, and what does not split, or too
small a product to split, keeps one of them idle. Two that have a micro-batch each meet once a step. The gradients are
added in the order of the micro-batches, so a step gives the same numbers whichever was done first.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

import torch

from offsite.config import TuneSpec
from offsite.core.dropout import OwnRandomness
from offsite.core.memory import usual_lanes
from offsite.data_owner.task import TextTask

if TYPE_CHECKING:
    from offsite.core.runtime import Runtime
    from offsite.data_owner.train import Tuning

G = TypeVar("G")
R = TypeVar("R")

_SHIFTING = ("dynamic", "longrope")  # rotary embeddings that a pass may change for all others


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

        No more is kept than there are lanes: a result is to be used up before the next is asked for. Each has random
        numbers of its own, under a seed that torch's generator gives it here: which lane is faster changes none.
        """
        seeded = list(zip(given, torch.randint(2**62, (len(given),)).tolist(), strict=True))

        def alone(one: tuple[G, int]) -> R:
            with OwnRandomness(one[1]):
                return work(one[0])

        side_by_side = len(given) - len(given) % self.count if self._pool is not None else 0
        waiting: deque[Future[R]] = deque()
        for one in seeded[:side_by_side]:
            assert self._pool is not None
            waiting.append(self._pool.submit(alone, one))
            if len(waiting) == self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        for one in seeded[side_by_side:]:
            yield alone(one)


def lane_count(tuning: "Tuning", spec: TuneSpec, where: "Runtime") -> int:
    """How many lanes a tuning has: what was asked for or is usual, and one where passes would get in each other's way.

    That is where they draw random numbers other than dropout's, whose order would be the threads', where frozen blocks
    are swapped for wider ones as they run, and where a long row changes the rotary embedding of all. With a head that
    trains each lane would hold a gradient as large as the head. Pictures gain nothing.
    """
    task = tuning.task
    if where.device.type != "cpu" or not isinstance(task, TextTask):
        return 1
    wanted = spec.lanes or usual_lanes(torch.get_num_threads(), where.dtype.itemsize)
    if wanted == 1 or spec.tune_head or (spec.narrow_weights and where.dtype == torch.float32):
        return 1
    shifting = any(
        word in str(getattr(module, "rope_type", "")) for module in task.network.body.modules() for word in _SHIFTING
    )
    return 1 if shifting or _draws(tuning, task) else wanted


@torch.no_grad()
def _draws(tuning: "Tuning", task: TextTask) -> bool:
    """Whether a pass in training draws random numbers of the process and not of its lane; they are given back."""
    for block in tuning.trained:
        block.train()
    before = torch.get_rng_state()
    with OwnRandomness(0):
        task.loss([min(range(task.rows), key=lambda row: len(task.examples[row].ids))], 0, 0)
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn
