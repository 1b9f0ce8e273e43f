"""The file of a feature cache: for each row of a tuning, the hidden states that enter the first trained block."""

import contextlib
import hashlib
import io
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offsite.data.batches import Batch, collate, micro_batches
from offsite.data.examples import Example
from offsite.errors import StorageError
from offsite.models.to_device import to_device
from offsite.progress import Event, Progress
from offsite.storage.files import storage_errors, write_stream

TOKENS_AT_ONCE = 1024  # size of the micro-batches that compute states; fixed, so that a rewritten file is the same


class FeatureFile:
    """The cached hidden states: those of all rows in a file, those of the current batch in memory.

    Args:
        examples: the training rows; rows with the same ids are stored once.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._local, self._lock = threading.local(), threading.Lock()  # micro-batches may run in several threads
        self._examples = examples
        self._offsets, self.tokens = _offsets(examples)
        self.width, self.dtype = 0, torch.float32  # width and dtype of a hidden state
        self._file: io.BufferedReader | None = None

    @property
    def states(self) -> Tensor | None:
        """The hidden states of this thread's batch, (B, T, H); None if the frozen blocks must run."""
        return getattr(self._local, "states", None)

    @states.setter
    def states(self, states: Tensor | None) -> None:
        self._local.states = states

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.tokens * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        """The size of one token's hidden state in bytes."""
        return self.width * self.dtype.itemsize

    def write(self, file: Path, compute: Callable[[Batch], Tensor], progress: Progress) -> None:
        """Write the states of all rows, unless an interrupted run has already written them.

        Args:
            file: the file to write; it appears complete or not at all.
            compute: takes a batch and returns its hidden states, (B, T, H).
            progress: receives the progress events.

        Raises:
            StorageError: the file cannot be written.
        """
        if file.exists() and file.stat().st_size == self.size:
            return
        temporary = file.with_name(f"{file.name}.tmp")
        with storage_errors(file):
            temporary.unlink(missing_ok=True)
            try:
                write_stream(temporary, self._chunks(compute, progress))
                temporary.chmod(0o600)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)

    def _chunks(self, compute: Callable[[Batch], Tensor], progress: Progress) -> Iterator[memoryview]:
        """Yields the bytes of each row's hidden states, in the order of the file."""
        examples, stage = self._examples, f"frozen blocks, once for all epochs ({describe_bytes(self.size)} on disk)"
        done = 0
        for group in _micro_batches(examples):
            states = compute(collate([examples[i] for i in group])).cpu()
            for state, row in zip(states, group, strict=True):
                yield state[: len(examples[row].ids) - 1].contiguous().view(torch.uint8).flatten().numpy().data
            done += len(group)
            progress(Event(stage, done, len(self._offsets)))

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[None]:
        """Context manager: in its body, states are read from the file."""
        with path.open("rb") as self._file:
            try:
                yield
            finally:
                self.states, self._file = None, None

    def load_batch(self, batch: Batch, device: torch.device) -> None:
        """Read the states of a batch that is about to run, if the file has all its rows.

        Args:
            batch: the batch, still in the CPU's memory: to look at it on the device, the CPU would have to wait.
            device: the device of the network.
        """
        lengths = batch.mask.sum(axis=1).tolist()
        rows = [row[:length] for row, length in zip(batch.ids, lengths, strict=True)]
        offsets = [self._offsets.get(_key(row)) for row in rows]
        self.states = None
        if all(offset is not None for offset in offsets):
            states = torch.zeros(*batch.ids.shape, self.width, dtype=self.dtype)
            for state, offset, length in zip(states, offsets, lengths, strict=True):
                self._read(state[:length], offset or 0)
            self.states = to_device(states.view(torch.uint8).numpy(), device).view(self.dtype)

    def _read(self, into: Tensor, offset: int) -> None:
        """Read states from the file into a tensor; `offset` is the position of the first token.

        The file is not memory-mapped, since its pages would count as memory of the process.

        Raises:
            StorageError: the file cannot be read or is too short.
        """
        assert self._file is not None
        buffer = into.view(torch.uint8).flatten().numpy().data  # the same memory
        try:
            with self._lock:
                self._file.seek(offset * self._token_bytes)
                if self._file.readinto(buffer) == len(buffer):
                    return
            problem = "it ends too early"
        except OSError as error:
            problem = str(error)
        raise StorageError(
            f"cannot read {self._file.name}", reasons=[problem], next_step="run the same command again with --resume"
        )


def _offsets(examples: Sequence[Example]) -> tuple[dict[bytes, int], int]:
    """The position of each row in the file, counted in tokens, by the hash of its ids; and the number of all tokens."""
    offsets, tokens = {}, 0
    for group in _micro_batches(examples):
        for row in group:
            offsets[_key(examples[row].ids[:-1])] = tokens
            tokens += len(examples[row].ids) - 1
    return offsets, tokens


def _micro_batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """The micro-batches for writing the file, which depend only on the rows; rows with the same ids run once."""
    different = {_key(example.ids[:-1]): i for i, example in enumerate(examples)}
    return micro_batches(examples, list(different.values()), TOKENS_AT_ONCE)


def _key(ids: npt.NDArray[np.int64]) -> bytes:
    """The hash of a row's ids."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def describe_bytes(size: int) -> str:
    """A size as text, in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"
