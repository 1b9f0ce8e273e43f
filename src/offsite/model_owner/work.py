"""What is computed for the emulator's weights before they are stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from offsite.config import HealingStep, PackSpec, Pruner, RefitMap


@dataclass(frozen=True)
class Work:
    """What the settings ask for, of what has anything to do: where nothing is lost, nothing is healed."""

    steps: tuple[HealingStep, ...]  # in their order
    pruner: Pruner | None  # the one that runs in the pass over the base's blocks
    share: float  # of every matrix that it sets to zero
    solves: tuple[RefitMap, ...]  # the output projections that are solved anew, in this order

    @property
    def block_steps(self) -> tuple[HealingStep, ...]:
        """The steps that change each kept block in its turn, in the pass over the base's blocks."""
        return tuple(step for step in self.steps if step.runs == "block")

    @property
    def later_steps(self) -> tuple[HealingStep, ...]:
        """The steps that change the whole emulator behind that pass."""
        return tuple(step for step in self.steps if step.runs == "after")

    @property
    def block_by_block(self) -> bool:
        """Whether there is such a pass: each block is changed in its turn, on what the blocks before it give."""
        return bool(self.block_steps) or self.pruner is not None

    @property
    def maps(self) -> bool:
        """Whether a map of the hidden state is solved for behind each kept block."""
        return any(step.declared for step in self.block_steps)

    @property
    def revisited(self) -> tuple[RefitMap, ...]:
        """The output projections that have turns of their own behind the pruning of a block's other layers."""
        last = self.pruner is not None and self.pruner.mlp_output_last and "mlp" not in self.solves
        return (*self.solves, "mlp") if last else self.solves

    @property
    def runs_network(self) -> bool:
        """Whether the base's network runs for it."""
        return self.block_by_block or bool(self.later_steps)


def work_of(middle: Sequence[int], spec: PackSpec) -> Work:
    """What the settings ask for with a middle of these blocks."""
    pruner = spec.pruner if spec.pruner.calibrated and spec.pruned else None
    dropped = spec.kept(middle) < len(middle)
    steps = tuple(step for step in spec.healing_steps if dropped or (pruner is not None and step.heals_pruning))
    return Work(
        steps=steps,
        pruner=pruner,
        share=spec.pruned if pruner is not None else 0.0,
        solves=spec.heal.refit_maps if any(step.solves_outputs for step in steps) else (),
    )
