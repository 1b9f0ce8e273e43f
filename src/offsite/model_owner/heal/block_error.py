"""The squared error of a block's output against its targets, with the token weights of the ridge regression."""

from collections.abc import Sequence

from torch import Tensor

from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import held_out_positions


def token_weights(target: Tensor) -> Tensor:
    """The weight of each token in the error, (..., 1): 1 / norm of its target output (..., H)."""
    norms: Tensor = target.norm(dim=-1, keepdim=True)
    return norms.clamp_min(1e-6).reciprocal()


def block_error(problem: BlockProblem, block: LoadedBlock, positions: Sequence[int]) -> float:
    """The weighted squared error of a block's output against its targets, summed over tokens and channels.

    Args:
        problem: the inputs and target outputs of the block.
        block: the block with the weights to measure.
        positions: indices of the batches to measure on.
    """
    total = 0.0
    for position in positions:
        target = problem.targets[position]
        error = target - block(problem.batches[position], problem.enters[position])
        total += float((token_weights(target) * error.square()).sum())
    return total


def judged_positions(problem: BlockProblem) -> Sequence[int]:
    """Indices of the batches on which a solution's error is measured: the held-out ones, or all if there are none."""
    return held_out_positions(len(problem.batches)) or range(len(problem.batches))
