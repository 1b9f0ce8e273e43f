"""The input of a healing step that works block by block, and the functions that its Python file must define."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.models.families.family import Architecture

if TYPE_CHECKING:
    from offsite.model_owner.narrow.loss_statistics import LossStatistics


class States(Protocol):
    """The hidden states (B, T, H) of every batch, in memory or in a file."""

    def __len__(self) -> int:
        """The number of batches."""

    def __getitem__(self, position: int, /) -> Tensor:
        """The hidden states of the batch with this index."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the hidden states of one batch after the other."""


@dataclass(frozen=True)
class BlockProblem:
    """A kept block whose weights are to be fitted, with its inputs and its target outputs.

    The targets are the base's hidden states before the next kept block, so they include the dropped blocks between.
    """

    load: Callable[[Mapping[str, Tensor]], LoadedBlock]  # loads the block with some tensors replaced, by their path
    family: Architecture
    config: Mapping[str, Any]  # the base's config
    batches: Sequence[Tensor]  # token ids (B, T), or pixels of pictures (B, 3, Y, X)
    enters: States  # the block's inputs in the emulator, (B, T, H) for each batch
    targets: States  # the target outputs of the block, (B, T, H) for each batch
    paths: Collection[str]  # paths of the block's tensors in the block, as checkpoint files name them
    loss: "LossStatistics | None" = None  # how the base's loss depends on the block, for rules that need it


@runtime_checkable
class BlockStep(Protocol):
    """Protocol of healing steps that change one kept block at a time; each is a Python file of this folder."""

    def solved_layers(self, family: Architecture, spec: PackSpec) -> tuple[str, ...]:
        """Paths in a block of the linear layers that the step fits; if there is a pruner, the step prunes them too."""

    def solve_block(
        self, problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
    ) -> Mapping[str, Tensor]:
        """Fit new tensors of the block to its targets.

        Args:
            problem: the block, with its inputs and targets.
            found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint
                files name it.
            spec: the settings of packing.
            pruning: the calibrated pruner; None if there is none.

        Returns:
            The new tensors; keys are paths in the block, as checkpoint files name them.
        """


def block_step(row: HealingStep) -> BlockStep:
    """Import the Python file of a healing step that works block by block."""
    return cast(BlockStep, import_module(row.module))
