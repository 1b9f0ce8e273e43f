"""The input of a healing step that works block by block, and the functions that its file defines."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from offsite.config import HealingStep, PackSpec
from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.models.family import Architecture


@dataclass(frozen=True)
class BlockProblem:
    """A kept block that is to be fitted, with its inputs and its target outputs.

    The targets include the effect of the dropped blocks after it.
    """

    load: Callable[[Mapping[str, Tensor]], LoadedBlock]  # loads the block with these tensors replaced
    family: Architecture
    config: Mapping[str, Any]  # the base's config
    batches: Sequence[Tensor]  # token ids (B, T), or pixels of pictures (B, 3, Y, X)
    enters: Sequence[Tensor]  # the block's inputs in the emulator, (B, T, H) for each batch
    targets: Sequence[Tensor]  # the wanted outputs of the block, (B, T, H) for each batch
    paths: Collection[str]  # of the block's tensors, as checkpoint files name them


@runtime_checkable
class BlockStep(Protocol):
    """Protocol: a module of this folder with a healing step that changes one kept block at a time."""

    def solved_layers(self, family: Architecture, spec: PackSpec) -> tuple[str, ...]:
        """Paths in a block of the linear layers that the step solves; it also prunes them if there is a pruner."""

    def solve_block(
        self, problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
    ) -> Mapping[str, Tensor]:
        """Solve for new tensors of the block.

        Args:
            problem: the block, with its inputs and targets.
            found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint
                files name it.
            spec: the settings.
            pruning: the calibrated pruner; None if there is none.

        Returns:
            The new tensors; keys are paths in the block, as checkpoint files name them.
        """


def block_step(row: HealingStep) -> BlockStep:
    """Load the file of a healing step that works block by block."""
    return cast(BlockStep, import_module(row.module))
