"""The input of a healing step that works on the whole emulator, and the functions that its Python file must define.

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

IN_MEMORY = 128 * 2**20  # bytes of the hidden states of all calibration batches; larger ones are kept in a file


@dataclass(frozen=True)
class Healing:
    """The input of healing: the base, the emulator's blocks, the settings, and the folder and the log to write to."""

    model: BaseModel
    sandwich: Sandwich
    emulator: Sequence[int]  # base indices of its blocks, in order
    widths: Sequence[Widths] | None  # new widths of its blocks; None if they are not narrowed
    spec: PackSpec
    scratch: Path  # a folder for results; in long runs it survives an interruption
    log: Path  # the file for the loss of each step, one JSON object per line
    progress: Progress


@runtime_checkable
class PlacesStep(Protocol):
    """Protocol of healing steps that choose which kept block runs at the place of each middle block.

    Each step is a Python file of this folder.
    """

    def fill_places(self, middle: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
        """For each block of the middle, in order, the base index of the kept block that runs at its place.

        Args:
            middle: base indices of the middle's blocks, in order.
            kept: base indices of the selected blocks, in order.
        """


@runtime_checkable
class EmulatorStep(Protocol):
    """Protocol of healing steps that change the whole emulator, after the block-by-block steps.

    Each step is a Python file of this folder.
    """

    def heal_emulator(self, healing: Healing, healed: Mapping[str, TensorRange]) -> Mapping[str, TensorRange]:
        """Change the emulator's tensors, starting from the results of the previous steps.

        Args:
            healing: the emulator and the settings.
            healed: tensors that earlier steps changed; keys are tensor names in the base, and the values are in files
                of the scratch folder.

        Returns:
            All tensors that have changed, with keys and files as in `healed`.

        Raises:
            DataError: the calibration text is unreadable or too short.
            StorageError: a file cannot be written.
            OffsiteError: the loss diverged.
            KeyboardInterrupt: the user interrupted the run; a resume point was saved.
        """


def places_step(row: HealingStep) -> PlacesStep:
    """Import the Python file of a step that chooses which kept block runs at the place of each middle block."""
    return cast(PlacesStep, import_module(row.module))


def emulator_step(row: HealingStep) -> EmulatorStep:
    """Import the Python file of a step that changes the whole emulator; it imports torch."""
    return cast(EmulatorStep, import_module(row.module))
