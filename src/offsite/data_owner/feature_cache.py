"""What enters the first trained block, computed once: the blocks before it are frozen and say the same in every epoch.

Where the data owner trains last blocks alone, most of a bundle's forward pass is one function of the rows. Its values
lie in a file of the run's folder, a row after the other; a batch whose rows are all there skips the frozen blocks, any
other batch (validation) runs as usual.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from offsite.config import TuneSpec
from offsite.data.batches import Batch, collate, micro_batches
from offsite.data.tokens import Example
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import IncompatibleError, StorageError
from offsite.kernels import Piece
from offsite.models.blocks import Wrapped, unwrapped_block
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file, storage_errors, write_stream
from offsite.storage.safetensors_files import strict_json
from offsite.training.label_losses import label_losses
from offsite.training.schedule import step_count

_NAME = "frozen blocks run once for all epochs"  # in the report of the kernels
_TOKENS = 1024  # that run at once; fixed, so that a file that is made again is the same
_OTHER_FILES = 28  # bytes that two resume points and the return take for each number that trains
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of a label's nats


@contextlib.contextmanager
def cached_features(tuning: Tuning, spec: TuneSpec, folder: Path, progress: Progress) -> Iterator[Piece]:
    """While this is open, frozen blocks before the first trained one run once for each row, if there are any.

    Nothing is cached where each row runs once, where the disk has no room, or where a later block needs more of the
    earlier ones than the hidden state. What was decided stays with the run, so it resumes bit for bit.

    Args:
        tuning: what will train; its frozen first blocks are wrapped, and as they were afterwards.
        spec: the settings.
        folder: the run's; the file lies there.
        progress: where the events go.

    Yields:
        For the report of the kernels: how many blocks do not run again, or why all of them do.

    Raises:
        StorageError: a file cannot be written or read.
    """
    why_not = _nothing_to_cache(tuning, spec)
    if why_not:
        yield Piece(_NAME, 0, why_not)
        return
    blocks = dict(tuning.blocks.named_children())
    before = _frozen_before(tuning)
    features = _Features()
    frozen = dict(list(blocks.items())[:before])
    first = list(blocks.values())[before]
    for name, block in frozen.items():
        tuning.blocks.register_module(name, _Skipped(block, features))
    try:
        with contextlib.ExitStack() as opened:
            why_not = _why_not_cached(tuning, first, features, folder, progress)
            if not why_not:
                file = folder / "features.bin"
                _write(tuning, first, features, file, progress)
                with storage_errors(file):
                    opened.enter_context(features.read_from(file))
                opened.callback(
                    _text(tuning).network.body.register_forward_pre_hook(features.recognise, with_kwargs=True).remove
                )
            yield Piece(_NAME, 0 if why_not else before, why_not or "they are the same in every epoch")
    finally:
        for name, block in frozen.items():
            tuning.blocks.register_module(name, block)


def _frozen_before(tuning: Tuning) -> int:
    """How many blocks stand before the first trained one."""
    trained = {id(block) for block in tuning.trained}
    return next(i for i, block in enumerate(tuning.blocks.children()) if id(unwrapped_block(block)) in trained)


def _nothing_to_cache(tuning: Tuning, spec: TuneSpec) -> str:
    """Why nothing can be gained; empty where something may."""
    if not isinstance(tuning.task, TextTask):
        return "pictures are seen anew in every epoch"
    if spec.memory.cache_features == "off":
        return "switched off by cache_features"
    if not _frozen_before(tuning):
        return "the first block trains"
    rows = tuning.task.rows
    once = step_count(spec, rows) <= math.ceil(rows / spec.length.batch_size)
    return "each row runs once" if once else ""


def _text(tuning: Tuning) -> TextTask:
    if not isinstance(tuning.task, TextTask):
        raise TypeError("features of something else than text were asked for")
    return tuning.task


class _Features:
    """Where each row's states are in the file, and the states of the batch that runs."""

    def __init__(self) -> None:
        self._mine, self._reading = threading.local(), threading.Lock()  # every lane runs a batch of its own
        self.width, self.dtype = 0, torch.float32
        self.places: Mapping[bytes, int] = {}  # tokens before the row, by the key of its ids
        self._file: io.BufferedReader | None = None

    @property
    def known(self) -> Tensor | None:
        """The states of this thread's batch, (B, T, H), or None: the frozen blocks have to run."""
        return getattr(self._mine, "known", None)

    @known.setter
    def known(self, states: Tensor | None) -> None:
        self._mine.known = states

    @property
    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize

    @contextlib.contextmanager
    def read_from(self, path: Path) -> Iterator[None]:
        with path.open("rb") as self._file:
            try:
                yield
            finally:
                self.known, self._file = None, None

    def recognise(self, body: nn.Module, arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
        """A hook: before the network's body runs a batch, read what is known of it."""
        ids: Tensor = settings["input_ids"]  # (B, T)
        lengths: list[int] = settings["attention_mask"].sum(-1).tolist()
        rows = [row[:length] for row, length in zip(ids.cpu().numpy(), lengths, strict=True)]
        places = [self.places.get(_key(row)) for row in rows]
        self.known = None
        if all(place is not None for place in places):
            states = torch.zeros(*ids.shape, self.width, dtype=self.dtype)
            for state, place, length in zip(states, places, lengths, strict=True):
                self._read(state[:length], place or 0)
            self.known = states.to(ids.device)

    def _read(self, into: Tensor, place: int) -> None:
        """Plain reads: a mapping would count against the process's memory."""
        assert self._file is not None
        room = into.view(torch.uint8).flatten().numpy().data  # the same memory
        try:
            with self._reading:
                self._file.seek(place * self.bytes_per_token)
                if self._file.readinto(room) == len(room):
                    return
            problem = "it ends too early"
        except OSError as error:
            problem = str(error)
        raise StorageError(
            f"cannot read {self._file.name}", reasons=[problem], next_step="run the same command again with --resume"
        )


class _Skipped(Wrapped):
    """A frozen block that does not run where what enters the first trained block is known: it hands on that."""

    def __init__(self, block: nn.Module, features: _Features) -> None:
        super().__init__(block)
        self._features = features
        self._beside: int | None = None  # how much the block returns beside the hidden state; None is no tuple

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """As the block's, in form."""
        known = self._features.known
        if known is not None:
            return known if self._beside is None else (known, *(None for _ in range(self._beside)))
        output = self.block(*arguments, **settings)
        self._beside = len(output) - 1 if isinstance(output, tuple) else None
        return output


class _Reached(Exception):  # noqa: N818  a signal, caught where it is raised for
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def _entering(tuning: Tuning, first: nn.Module, batch: Batch) -> Tensor:
    """What enters the first trained block, (B, T, H)."""

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0])

    handle = first.register_forward_pre_hook(stop)
    try:
        label_losses(_text(tuning).network, batch)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise IncompatibleError(
        f"{type(_text(tuning).network.body).__name__} does not call its blocks with the hidden state"
    )


def _why_not_cached(tuning: Tuning, first: nn.Module, features: _Features, folder: Path, progress: Progress) -> str:
    """Why features are not cached, as it was decided when the run began; empty where they are.

    Fills in the features' form and places.
    """
    record = folder / "features.json"
    decided = _decided(record) if record.exists() else None
    if decided is False:
        return "decided when the run began"
    agree = _agree(tuning, first, features, tuning.task.order(0)[0])
    features.places, tokens = _places(_text(tuning).examples)
    if decided:
        return ""
    size, numbers = tokens * features.bytes_per_token, sum(map(torch.numel, tuning.weights.masters.values()))
    with storage_errors(folder):
        room = shutil.disk_usage(folder).free - _OTHER_FILES * numbers
    why_not = "" if agree else "what later blocks need is more than a hidden state"
    if agree and size > room:
        why_not = f"caching takes {_shown(size)} of disk"
    if why_not:
        progress(Event(f"frozen blocks run in every epoch: {why_not}", 0))
    replace_file(record, json.dumps({"cached": not why_not}).encode())
    return why_not


def _decided(record: Path) -> bool:
    try:
        content = strict_json(record.read_bytes())
        if content in ({"cached": True}, {"cached": False}):
            return bool(content["cached"])
        problem = "it does not say whether features are cached"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise StorageError(
        f"cannot read {record}",
        reasons=[problem],
        next_step=f"remove the run and start anew: rm -r {record.parent}",
    )


@torch.no_grad()
def _agree(tuning: Tuning, first: nn.Module, features: _Features, rows: Sequence[int]) -> bool:
    """Whether some rows have the same losses with the frozen blocks skipped as with them run."""
    for block in tuning.trained:
        block.eval()
    group = next(micro_batches(_text(tuning).examples, rows, _TOKENS))
    batch = collate([_text(tuning).examples[i] for i in group])
    expected = label_losses(_text(tuning).network, batch)[1]
    states = _entering(tuning, first, batch)
    features.width, features.dtype = states.shape[-1], states.dtype
    mask = torch.from_numpy(batch.mask).to(states.device, torch.bool)
    try:
        features.known = states.masked_fill(~mask[..., None], 0)  # as they are read
        found = label_losses(_text(tuning).network, batch)[1]
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):  # it misses what a block returned beside
        return False
    finally:
        features.known = None
    tolerance = _TOLERANCE.get(states.dtype, 2e-2)
    return bool(torch.allclose(expected, found, rtol=tolerance, atol=tolerance))


def _places(examples: Sequence[Example]) -> tuple[dict[bytes, int], int]:
    """Tokens before each row in the file, by the key of its ids, in the order of writing; and the tokens of all."""
    places, tokens = {}, 0
    for group in _groups(examples):
        for row in group:
            places[_key(examples[row].ids[:-1])] = tokens
            tokens += len(examples[row].ids) - 1
    return places, tokens


def _groups(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Rows that run together, those with the same ids once: a function of the rows alone."""
    different = {_key(example.ids[:-1]): i for i, example in enumerate(examples)}
    return micro_batches(examples, list(different.values()), _TOKENS)


def _write(tuning: Tuning, first: nn.Module, features: _Features, file: Path, progress: Progress) -> None:
    """Run every row through the frozen blocks and write what comes out, unless an interrupted run has done so."""
    examples = _text(tuning).examples
    size = features.bytes_per_token * sum(len(examples[i].ids) - 1 for group in _groups(examples) for i in group)
    if file.exists() and file.stat().st_size == size:
        return

    def chunks() -> Iterator[memoryview]:
        done = 0
        for group in _groups(examples):
            states = _entering(tuning, first, collate([examples[i] for i in group])).cpu()
            for state, row in zip(states, group, strict=True):
                yield state[: len(examples[row].ids) - 1].contiguous().view(torch.uint8).flatten().numpy().data
            done += len(group)
            progress(Event(f"frozen blocks, once for all epochs ({_shown(size)} on disk)", done, len(features.places)))

    temporary = file.with_name(f"{file.name}.tmp")
    with storage_errors(file):
        temporary.unlink(missing_ok=True)
        try:
            write_stream(temporary, chunks())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _key(ids: npt.NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _shown(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"
