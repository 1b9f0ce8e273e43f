"""The input of a healing step that works on the whole emulator, and the functions that its file defines.

Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.models.block_widths import Widths
from offsite.progress import Progress
from offsite.storage.safetensors_files import TensorRange


@dataclass(frozen=True)
class Healing:
    """An emulator to heal, with the settings, and the folder and the log to write to."""

    model: BaseModel
    sandwich: Sandwich
    emulator: Sequence[int]  # base indices of its blocks, in order
    widths: Sequence[Widths] | None  # of its blocks, if they are narrowed
    spec: PackSpec
    scratch: Path  # a folder for results; in long runs it survives an interruption
    log: Path  # the file for the loss of each step, one JSON object per line
    progress: Progress


@runtime_checkable
class PlacesStep(Protocol):
    """Protocol: a module of this folder with a step that puts a kept block at the place of each middle block."""

    def fill_places(self, middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
        """For each block of the emulator, in order, the base index of the kept block whose weights it uses."""


@runtime_checkable
class EmulatorStep(Protocol):
    """Protocol: a module of this folder with a step that changes the whole emulator, after the block-by-block steps."""

    def heal_emulator(self, healing: Healing, healed: Mapping[str, TensorRange]) -> Mapping[str, TensorRange]:
        """Change the emulator's tensors, starting from the results of the steps before.

        Args:
            healing: the emulator.
            healed: tensors that earlier steps changed; keys are tensor names in the base, and the values are in files
                of `scratch`.

        Returns:
            All tensors that have changed; keys are tensor names in the base, and the values are in files of `scratch`.

        Raises:
            DataError: the calibration text is unreadable or too short.
            StorageError: a file cannot be written.
            OffsiteError: the loss diverged.
            KeyboardInterrupt: the user interrupted the run; a resume point was saved.
        """


def places_step(row: HealingStep) -> PlacesStep:
    """Load the module of a step that puts kept blocks at the places of the middle's blocks."""
    return cast(PlacesStep, import_module(row.module))


def emulator_step(row: HealingStep) -> EmulatorStep:
    """Load the module of a step that changes the whole emulator; imports torch."""
    return cast(EmulatorStep, import_module(row.module))
