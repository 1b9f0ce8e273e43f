"""Refit of a layer that norms follow: the least squares solution is applied in full, in part, or not at all.

The solution assumes that the norms' statistics do not change, which is only approximately true. So the block's error is
measured for several fractions of the change.
"""

from collections.abc import Mapping

from torch import Tensor

from offsite.model_owner.heal.block_error import block_error, judged_positions
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.output_projection import OutputProjection

SHARES = (1.0, 0.5, 0.25, 0.0)  # of the change that the least squares problem gives


def solve_in_front_of_norms(
    problem: BlockProblem, found: Mapping[str, Tensor], layer: OutputProjection
) -> tuple[Tensor, Tensor | None]:
    """The fitted weight (H, F) and bias (H,) of a layer that norms follow.

    A fraction of the solution's change is applied. It is the one with the smallest error of the real block's output on
    held-out batches, measured with the solution on the other batches.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        layer: the layer and its least squares problem.
    """
    trial, change = layer.problem.solutions()
    judged = judged_positions(problem)

    def error(share: float) -> float:
        return block_error(problem, problem.load({**found, **layer.tensors(*layer.moved(trial, share))}), judged)

    return layer.moved(change, min(SHARES, key=error))
