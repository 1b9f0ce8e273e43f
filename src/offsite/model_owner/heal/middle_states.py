"""Hidden states of the base before and after its middle, computed once, block by block, and stored on disk.

Distillation and search read them many times, so bottom and middle of the base need not run again.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from offsite.errors import StorageError
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration.calibration_batches import token_counts
from offsite.model_owner.sandwich import Sandwich
from offsite.models.torch_tensors import read_tensor
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import read_header

_GROUP_TOKENS = 65_536  # tokens whose hidden states are in memory at a time, before they are written


@dataclass(frozen=True)
class MiddleStates:
    """The base's hidden states before and after its middle for every batch, in files in the compute dtype."""

    folder: Path
    batches: Sequence[Tensor]  # token ids (B, T), or pixels (B, 3, Y, X)
    tokens: Sequence[int]  # number of tokens in each batch, B * T

    def at(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read the batch with this index: its ids or pixels, and the hidden states before and after the middle.

        Ids are (B, T), pixels (B, 3, Y, X), and hidden states (B, T, H) each.
        """
        ids, held = self.batches[position], read_header(self.folder / _name(position))
        return ids, read_tensor(held["enters"]).to(ids.device), read_tensor(held["leaves"]).to(ids.device)


def middle_states(
    model: BaseModel,
    sandwich: Sandwich,
    batches: Sequence[Tensor],
    machine: Runtime,
    folder: Path,
    progress: Progress,
    stage: str,
) -> MiddleStates:
    """Compute and store the base's hidden states before and after its middle, for batches of token ids or pixels.

    Batches that an earlier run stored in `folder` are not computed again.

    Args:
        model: the opened base.
        sandwich: the split of the base into bottom, middle and top.
        batches: token ids (B, T) or pixels (B, 3, Y, X).
        machine: device and compute dtype, which is also the stored dtype.
        folder: the folder for the files.
        progress: receives the progress events.
        stage: the name of this work in the progress display.

    Raises:
        StorageError: the disk has too little free space, or cannot be written.
    """
    batches = [ids.to(machine.device) for ids in batches]
    missing = [position for position in range(len(batches)) if not (folder / _name(position)).exists()]
    runner = BlockRunner(model, machine)
    end = sandwich.middle[-1] + 1
    tokens = token_counts(model, batches)
    for number, group in enumerate(groups := list(_groups(missing, tokens))):
        hidden = {position: runner.load(0).embed(batches[position]) for position in group}
        if not number:
            _require_room(folder, len(missing) * 2 * hidden[group[0]].numel() * machine.dtype.itemsize)
        enters = dict(hidden) if not sandwich.bottom else {}
        for index in range(end):
            progress(Event(stage, number * end + index, len(groups) * end))
            block = runner.load(index)
            hidden = {position: block(batches[position], states) for position, states in hidden.items()}
            if index + 1 == len(sandwich.bottom):
                enters = dict(hidden)
        for position in group:
            states = {"enters": enters[position], "leaves": hidden[position]}
            kept = {name: value.to("cpu", machine.dtype).contiguous() for name, value in states.items()}
            replace_file(folder / _name(position), save(kept))
    return MiddleStates(folder, batches, tokens)


def _name(position: int) -> str:
    return f"batch-{position:06}.safetensors"


def _groups(positions: Sequence[int], tokens: Sequence[int]) -> Iterator[list[int]]:
    """Divide batch positions into groups whose hidden states fit into memory together.

    `tokens` has the number of tokens of every batch, indexed by position.
    """
    group: list[int] = []
    for position in positions:
        group.append(position)
        if sum(tokens[one] for one in group) >= _GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _require_room(folder: Path, needed: int) -> None:
    """Raise a StorageError if the disk of `folder` has less than `needed` bytes of free space."""
    there = next(parent for parent in folder.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(
            f"the hidden states of the base need {needed / 2**20:,.0f} MiB in {folder}",
            reasons=[f"{free / 2**20:,.0f} MiB are free"],
            next_step="free some space on that disk and run the same command with --resume, or name a folder on "
            "another disk with --out",
        )
