"""What several processes of one training run exchange, through torch.distributed.

Every process has all rows and the same trained weights, and runs its own share of the rows of each optimiser step.
Small things (figures, decisions, errors) travel as JSON or fp64 numbers between CPUs with gloo; gradients are summed
where they are, on CUDA devices with NCCL. Without a launcher there is one process (`ONE`), and nothing is exchanged.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from offsite import errors
from offsite.errors import OffsiteError
from offsite.training.launcher import Place

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LONGEST_WAIT = timedelta(minutes=15)  # for a process that is slower than this one, or no longer answers
_PRINTING = timedelta(seconds=10)  # for the process that prints an error
_BUCKET = 2**24  # numbers that are summed at once: 64 MiB
_LEAVING = 15.0  # seconds for the others to ask who prints, while the first process may keep the store
_LEAVING_SOME = 3.0  # the same, where another one is known to be gone
_CLAIM, _PRINTED, _ASKED = "offsite/claimed", "offsite/printed", "offsite/asked"  # keys in the store of the launcher


class Processes:
    """The processes of a run, seen from one of them. Methods that exchange something must be called by all of them.

    Args:
        place: the place of this process.
        store: torch's key-value store of the launcher; None if there is only one process.
    """

    def __init__(self, place: Place = Place(), store: Any = None) -> None:
        self.place = place
        self._store = store
        self._agreed = False  # whether all processes end for the same reason
        self._lost = False  # whether an exchange failed, since another process is gone

    @property
    def count(self) -> int:
        """The number of processes."""
        return self.place.count

    @property
    def first(self) -> bool:
        """Whether this is the first process: the only one that writes and prints."""
        return self.place.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of some items: every n-th, so that shares of items in order of length are alike."""
        return items if self.count == 1 else self.shares(items)[self.place.rank]

    def shares(self, items: Sequence[T]) -> list[Sequence[T]]:
        """The share of each process, in the order of their ranks."""
        return [items[rank :: self.count] for rank in range(self.count)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes, in fp64."""
        if self.count == 1:
            return list(values)
        import torch

        summed = torch.tensor(values, dtype=torch.float64)
        with self._exchange():
            torch.distributed.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one process or more."""
        return bool(self.sum([flag])[0])

    def sum_tensors(self, tensors: "Sequence[torch.Tensor]") -> None:
        """Replace each tensor, in place, by its sum over all processes; the result is the same, bit for bit, in all.

        Args:
            tensors: tensors of one dtype on one device, with the same shapes in all processes.
        """
        if self.count == 1:
            return
        import torch

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            with self._exchange():
                torch.distributed.all_reduce(flat)
            begin = 0
            for tensor in bucket:
                tensor.detach().copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
                begin += tensor.numel()

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of each process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        import torch

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._exchange():
            torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
            padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
            padded[: len(own)] = own
            found = [torch.zeros_like(padded) for _ in range(self.count)]
            torch.distributed.all_gather(found, padded)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(found, sizes, strict=True)]

    def from_first(self, value: T) -> T:
        """The first process's JSON value."""
        first: T = self.gather(value if self.first else None)[0]
        return first

    def tensors_from_first(self, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """The first process's tensors on the CPU, by name; what other processes pass is ignored."""
        if self.count == 1:
            return dict(tensors)
        import torch

        described = {name: (str(it.dtype).removeprefix("torch."), list(it.shape)) for name, it in tensors.items()}
        found = {}
        for name, (dtype, shape) in self.from_first(described).items():
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            if self.first:
                tensor.copy_(tensors[name].detach())
            with self._exchange():
                torch.distributed.broadcast(tensor, src=0)
            found[name] = tensor
        return found

    def gather_tensor(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """A tensor (on the CPU, of the same shape everywhere) of each process, in the order of their ranks."""
        if self.count == 1:
            return [tensor]
        import torch

        found = [torch.zeros_like(tensor) for _ in range(self.count)]
        with self._exchange():
            torch.distributed.all_gather(found, tensor)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context manager: if its body fails in one process, all processes fail with the same error.

        All processes wait at the end of the body for each other. The body must not exchange anything.

        Raises:
            OffsiteError: of the lowest rank whose body raised one, with its class and its texts.
        """
        own: OffsiteError | None = None
        try:
            yield
        except OffsiteError as error:
            if self.count == 1:
                raise
            own = error
        if self.count == 1:
            return
        raised = self.gather(None if own is None else [type(own).__name__, own.what, own.reasons, own.next_step])
        failed = [rank for rank, error in enumerate(raised) if error is not None]
        if not failed:
            return
        self.agree_to_end()
        kind, what, reasons, next_step = raised[failed[0]]
        if len(failed) < self.count:
            what = f"process {failed[0]} of {self.count}: {what}"
        raise getattr(errors, kind)(what, reasons=reasons, next_step=next_step) from None

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuse to train if processes have different settings, bundles, data or versions.

        Args:
            values: JSON values by name, which must be the same in all processes.

        Raises:
            UsageError: they differ; the error lists each value that differs from the first process's.
        """
        first, *others = self.gather(dict(values))
        different = [
            f"{name}: {_shorten(first.get(name))} in process 0, {_shorten(other.get(name))} in process {rank}"
            for rank, other in enumerate(others, 1)
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if different:
            self.agree_to_end()
            raise errors.UsageError(
                f"the {self.count} processes would not train the same",
                reasons=different[:8] + ([f"and {len(different) - 8} more differences"] if len(different) > 8 else []),
                next_step="give every process the same command, files and versions",
            )

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Context manager: an exchange that fails becomes an error of ours, and is remembered."""
        try:
            with _connected():
                yield
        except OffsiteError:
            self._lost = True
            raise

    def agree_to_end(self) -> None:
        """Note that all processes now end for the same reason, so that only the first one prints it."""
        self._agreed = True

    def claim_report(self) -> bool:
        """Whether this process prints how the run ended.

        If all end for the same reason, the first one prints; otherwise the one that asks first, whatever its rank.
        Others wait until it has printed (see `end_report`), since a launcher stops all processes when one has ended.
        """
        if self._store is None:
            return True
        own = str(self.place.rank)
        try:
            self._store.add(_ASKED, 1)
            if self._agreed and self.first:
                self._store.set(_CLAIM, own)
                return True
            if not self._agreed and self._store.compare_set(_CLAIM, "", own).decode() == own:
                return True
            self._store.wait([_PRINTED], _PRINTING)
        except RuntimeError:  # the store ended with the process that kept it: killed, or after it had printed its error
            return self._lost
        return False

    def end_report(self) -> None:
        """Tell the other processes that this one has printed how the run ended, or need not print."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(_PRINTED, "1")
            until = time.monotonic() + (_LEAVING_SOME if self._lost else _LEAVING)
            while self.first and self._store.add(_ASKED, 0) < self.count and time.monotonic() < until:
                time.sleep(0.02)


ONE = Processes()


@contextlib.contextmanager
def joined(place: Place, on_join: Callable[[Processes], None] = lambda _: None) -> Iterator[Processes]:
    """Context manager: connects the processes of a run, and disconnects them after the body if that has not failed.

    Args:
        place: the place of this process, from `read_place`.
        on_join: called with the processes as soon as they can agree on who prints.

    Raises:
        OffsiteError: the processes do not find each other.
    """
    if place.count == 1:
        yield ONE
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a process that ends makes others print C++ frames
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available() and distributed.is_nccl_available()
    with _connected():
        found = rendezvous("env://", place.rank, place.count, timeout=_LONGEST_WAIT)
        store = next(iter(found))[0]
    processes = Processes(place, store)
    on_join(processes)
    with processes._exchange():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.count,
            timeout=_LONGEST_WAIT,
        )
    yield processes
    distributed.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def random_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a process that has no random state of its own: all processes have different ones after every start.

    Args:
        seed: the seed of the run.
        step: the number of finished steps.
        rank: the number of the process.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "little")


def _buckets(tensors: "Sequence[torch.Tensor]") -> "Iterator[list[torch.Tensor]]":
    """Group tensors, in their order, into lists of at most `_BUCKET` numbers; a larger tensor is alone."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(held.numel() for held in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Context manager: an exchange that fails because another process is gone becomes an error of ours."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch's errors of connections are of this class
        raise OffsiteError(
            "another process of this run has ended, or cannot be reached",
            reasons=[str(error).strip().splitlines()[0][:200]],
            next_step="look for the error of the process that ended first; then run the same command with --resume",
        ) from None


def _shorten(value: object) -> str:
    """A value for an error message; if it is longer than 40 characters, its first 12."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
