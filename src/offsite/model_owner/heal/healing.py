"""What a step of healing is given that looks at more than one block, and the function that its file has. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.progress import Progress
from offsite.storage.safetensors_files import TensorRange


@dataclass(frozen=True)
class Healing:
    """An emulator that is to be healed."""

    model: BaseModel
    sandwich: Sandwich
    emulator: Sequence[int]  # base indices of its blocks, in order
    spec: PackSpec
    scratch: Path  # a folder for what was found; it outlives an interruption where the work takes long
    log: Path  # the file for a curve of the healing, a JSON object a line
    progress: Progress


@runtime_checkable
class PlacesStep(Protocol):
    """A file of this folder with a step that says which blocks stand in the middle's places."""

    def fill_places(self, middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
        """For each block of the emulator, in order, the kept block whose weights it has, by base index."""


@runtime_checkable
class EmulatorStep(Protocol):
    """A file of this folder with a step that changes the whole emulator, behind the pass block by block."""

    def heal_emulator(self, healing: Healing, healed: Mapping[str, TensorRange]) -> Mapping[str, TensorRange]:
        """Change the emulator's tensors from where the steps before have brought them.

        Args:
            healing: the emulator.
            healed: tensors that have changed before, by base name, as they lie in files of `scratch`.

        Returns:
            All tensors that have changed, by base name, as they lie in files of `scratch`.

        Raises:
            DataError: the calibration text is unreadable or too short.
            StorageError: something cannot be written.
            OffsiteError: the work diverged.
            KeyboardInterrupt: the user stopped it; a resume point was saved.
        """


def places_step(row: HealingStep) -> PlacesStep:
    """The file with a step that fills places."""
    return cast(PlacesStep, import_module(row.module))


def emulator_step(row: HealingStep) -> EmulatorStep:
    """The file with a step that changes the whole emulator; imports torch."""
    return cast(EmulatorStep, import_module(row.module))
