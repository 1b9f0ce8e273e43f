"""Hidden states of the calibration data between two blocks: in memory, or in a file if they are large.

While blocks are healed one after the other, the states after the last finished block are also a resume point.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offsite.errors import StorageError
from offsite.model_owner.heal.healing_protocol import IN_MEMORY
from offsite.models.torch_tensors import read_tensor
from offsite.storage.files import replace_file, storage_errors, write_stream
from offsite.storage.leftovers import delete_command
from offsite.storage.safetensors_files import TensorRange
from offsite.storage.strict_json import strict_json


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states (B, T, H) of every batch, in float32; those in a file are read when they are asked for."""

    held: Sequence[Tensor] | Sequence[TensorRange]
    device: torch.device

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.held)

    def __getitem__(self, position: int) -> Tensor:
        """The hidden states of the batch with this index, (B, T, H)."""
        one = self.held[position]
        return read_tensor(one).to(self.device) if isinstance(one, TensorRange) else one

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the hidden states of one batch after the other."""
        return (self[position] for position in range(len(self)))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape (B, T, H) of the hidden states of each batch."""
        return [tuple(one.shape) for one in self.held]

    @property
    def file(self) -> Path | None:
        """The file with the hidden states; None if they are in memory."""
        first = self.held[0]
        return first.file if isinstance(first, TensorRange) else None


@dataclass(frozen=True)
class FinishedBlock:
    """A resume point: where healing block by block stood after a kept block was finished."""

    block: int  # index in the base of the kept block that was finished last
    base_blocks: int  # number of the base's blocks that the base's hidden states went through
    own: HiddenStates  # of the emulator, after the block
    base: HiddenStates


class StatesFolder:
    """Keeps large hidden states in files of a folder, together with a resume point.

    Args:
        folder: the folder for the files; it survives an interruption if the run can be resumed.
        record: the file of the resume point; None if none is to be written.
        device: the device on which blocks run.
    """

    def __init__(self, folder: Path, record: Path | None, device: torch.device) -> None:
        self._folder, self._record, self._device = folder, record, device
        self._recorded: frozenset[str] = frozenset()  # names of the files that belong to the resume point

    def keep(self, states: Iterable[Tensor]) -> HiddenStates:
        """Hold the hidden states (B, T, H) of one batch after the other: in memory, or in a new file if too large.

        Raises:
            StorageError: the file cannot be written.
        """
        held: list[Tensor] = []
        batches, size = iter(states), 0
        for one in batches:
            held.append(one)
            size += one.nbytes
            if size > IN_MEMORY:
                return self._write(itertools.chain(held, batches))
        return HiddenStates(held, self._device)

    def discard(self, states: HiddenStates, still_used: HiddenStates | None) -> None:
        """Delete the file of hidden states, unless the states `still_used` or the resume point are in it."""
        file = states.file
        used = still_used is not None and still_used.file == file
        if file is not None and not used and file.name not in self._recorded:
            file.unlink()

    def save(self, point: FinishedBlock) -> None:
        """Write a resume point, then delete the files of the previous one.

        Raises:
            StorageError: a file cannot be written; the previous resume point is still valid.
        """
        if self._record is None:
            return
        parts = [states if states.file else self._write(states) for states in (point.own, point.base)]
        files = [states.file.name for states in parts if states.file]
        found = {"block": point.block, "base_blocks": point.base_blocks, "files": files}
        replace_file(self._record, json.dumps({**found, "shapes": [states.shapes for states in parts]}).encode())
        self._recorded = frozenset(files)
        self._delete_others()

    def load(self) -> FinishedBlock | None:
        """Read the resume point of an interrupted run, and delete other files of hidden states; None if there is none.

        Raises:
            StorageError: the resume point is damaged.
        """
        if self._record is None or not self._record.exists():
            return None
        try:
            found: Any = strict_json(self._record.read_bytes())
            own, base = (self._open(*part) for part in zip(found["files"], found["shapes"], strict=True))
            point = FinishedBlock(int(found["block"]), int(found["base_blocks"]), own, base)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"the resume point in {self._record} is damaged",
                reasons=[str(error)],
                next_step=f"remove the run and start again: {delete_command([self._record.parent])}",
            ) from None
        self._recorded = frozenset(found["files"])
        self._delete_others()
        return point

    def _write(self, states: Iterable[Tensor]) -> HiddenStates:
        """Write the hidden states of one batch after the other to a new file."""
        number = next(one for one in itertools.count() if not (self._folder / _name(one)).exists())
        file, shapes = self._folder / _name(number), []

        def chunks() -> Iterator[memoryview]:
            for one in states:
                shapes.append(tuple(one.shape))
                yield one.detach().float().cpu().contiguous().view(-1).numpy().data.cast("B")

        with storage_errors(file):
            write_stream(file, chunks())
        return self._ranges(file, shapes)

    def _ranges(self, file: Path, shapes: Sequence[tuple[int, ...]]) -> HiddenStates:
        starts = itertools.accumulate((4 * math.prod(shape) for shape in shapes), initial=0)
        ranges = [TensorRange("", "F32", shape, file, start) for shape, start in zip(shapes, starts, strict=False)]
        return HiddenStates(ranges, self._device)

    def _open(self, name: str, shapes: Sequence[Sequence[int]]) -> HiddenStates:
        """Open a file of the resume point; its content is read into memory if it is small."""
        opened = self._ranges(self._folder / name, [tuple(shape) for shape in shapes])
        size = sum(4 * math.prod(shape) for shape in shapes)
        if (self._folder / name).stat().st_size != size:
            raise ValueError(f"{name} does not have {size} bytes")
        return opened if size > IN_MEMORY else HiddenStates(list(opened), self._device)

    def _delete_others(self) -> None:
        """Delete all files of hidden states that do not belong to the resume point."""
        for file in self._folder.glob(_name("*")):
            if file.name not in self._recorded:
                file.unlink()


def _name(number: object) -> str:
    return f"states-{number}.bin"
