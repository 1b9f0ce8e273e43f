"""The input of a selection rule, and the function that each rule's file must define. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from offsite.config import PackSpec, SelectionRule
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.progress import Progress


@dataclass(frozen=True)
class Selection:
    """The input of a selection rule: the base, its split into bottom, middle and top, and the settings."""

    model: BaseModel
    sandwich: Sandwich
    spec: PackSpec
    scratch: Path  # a folder where a search stores its scores
    progress: Progress

    @property
    def middle(self) -> Sequence[int]:
        """Base indices of the blocks to choose from, in order."""
        return self.sandwich.middle

    @property
    def keep(self) -> int:
        """The number of blocks that the emulator keeps; less than the length of the middle."""
        return self.spec.kept(self.sandwich.middle)


@runtime_checkable
class Selector(Protocol):
    """Protocol of selection rules; each rule is a Python file of this folder."""

    def select(self, selection: Selection) -> tuple[int, ...]:
        """The base indices of the middle blocks that the emulator keeps, in ascending order.

        Raises:
            UsageError: a setting of the rule does not fit the model.
            DataError: the calibration data is unreadable or too short.
            StorageError: a file cannot be written.
        """


def selector(row: SelectionRule) -> Selector:
    """Import the Python file of a selection rule; this imports torch if the rule runs the network."""
    return cast(Selector, import_module(row.module))
