"""Which computations the settings require for the emulator's weights before they are stored: healing and pruning."""

from collections.abc import Sequence
from dataclasses import dataclass

from offsite.config import HealingStep, PackSpec, Pruner, RefitMap


@dataclass(frozen=True)
class Work:
    """The healing and pruning that the settings require for a model.

    Healing steps that would have no effect are left out: without a loss there is nothing to heal.
    """

    steps: tuple[HealingStep, ...]  # in the order in which they run
    pruner: Pruner | None  # the calibrated pruner; None if there is none
    share: float  # fraction of every matrix that the pruner sets to zero
    solves: tuple[RefitMap, ...]  # the output projections ("mlp", "attention") that refit fits, in this order
    narrows: bool = False  # whether heads, neurons or experts are removed from blocks

    @property
    def block_steps(self) -> tuple[HealingStep, ...]:
        """The healing steps that change one kept block at a time."""
        return tuple(step for step in self.steps if step.runs == "block")

    @property
    def later_steps(self) -> tuple[HealingStep, ...]:
        """The healing steps that change the whole emulator, after the block-by-block steps."""
        return tuple(step for step in self.steps if step.runs == "after")

    @property
    def block_by_block(self) -> bool:
        """Whether blocks are changed one at a time: narrowed, healed, or pruned by a calibrated pruner."""
        return bool(self.block_steps) or self.narrows or self.pruner is not None

    @property
    def adds_affine_layers(self) -> bool:
        """Whether an affine layer is fitted after each kept block."""
        return any(step.declared for step in self.block_steps)

    @property
    def revisited(self) -> tuple[RefitMap, ...]:
        """The output projections that are fitted or pruned after the block's other layers were pruned."""
        last = self.pruner is not None and self.pruner.mlp_output_last and "mlp" not in self.solves
        return (*self.solves, "mlp") if last else self.solves

    @property
    def runs_network(self) -> bool:
        """Whether healing or pruning runs the base's network."""
        return self.block_by_block or bool(self.later_steps)


def work_of(middle: Sequence[int], spec: PackSpec) -> Work:
    """The healing and pruning that the settings require; `middle` are the base indices of the middle's blocks."""
    pruner = spec.pruner if spec.pruner.calibrated and spec.pruned else None
    dropped = spec.kept(middle) < len(middle)
    changed = pruner is not None or spec.narrows
    steps = tuple(step for step in spec.healing_steps if dropped or (changed and step.heals_pruning))
    return Work(
        steps=steps,
        pruner=pruner,
        share=spec.pruned if pruner is not None else 0.0,
        solves=spec.heal.refit_maps if any(step.solves_outputs for step in steps) else (),
        narrows=spec.narrows,
    )
