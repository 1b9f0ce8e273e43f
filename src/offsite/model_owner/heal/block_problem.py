"""What a step of healing block by block is given, and the functions that its file has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.compress.pruner import Pruning
from offsite.models.family import Architecture


@dataclass(frozen=True)
class BlockProblem:
    """A kept block when its turn has come: it is to stand in for the dropped blocks behind it too."""

    load: Callable[[Mapping[str, Tensor]], LoadedBlock]  # the block, with tensors replaced by path in files
    family: Architecture
    config: Mapping[str, Any]  # the base's
    batches: Sequence[Tensor]  # token ids (B, T), or pixels of pictures (B, 3, Y, X)
    enters: Sequence[Tensor]  # the emulator's hidden state before the block, (B, T, H) for each batch
    targets: Sequence[Tensor]  # what should leave the block, (B, T, H) for each batch


@runtime_checkable
class BlockStep(Protocol):
    """A file of this folder with a step that changes each kept block in its turn."""

    def solved_layers(self, family: Architecture, spec: PackSpec) -> tuple[str, ...]:
        """Paths in a block of the linear layers that the step solves, and then prunes if there is a pruner."""

    def solve_block(
        self, problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
    ) -> Mapping[str, Tensor]:
        """Solve for new tensors of the block.

        Args:
            problem: the block.
            found: tensors of it that have changed before, by path in the block in files.
            spec: the step's settings.
            pruning: the calibrated pruner of the pass, if there is one.

        Returns:
            The new tensors, by path in the block in files.
        """


def block_step(row: HealingStep) -> BlockStep:
    """The file with a step that runs block by block."""
    return cast(BlockStep, import_module(row.module))
