"""Affine maps: h + h W + b behind each kept block, solved so that it stands in for the blocks dropped behind that.

Targets, order and solver are refit's. Nothing is asked of the block, which stays as it is: the map takes what leaves
it, so it does where a norm follows the MLP too. Compare ReplaceMe (arXiv 2505.02819), which solves for a linear map
behind an MLP, on the base's activations, and merges it into that MLP.
"""

from collections.abc import Mapping

from torch import Tensor

from offsite.config import PackSpec
from offsite.model_owner.compress.pruner import Pruning
from offsite.model_owner.heal.block_problem import BlockProblem
from offsite.model_owner.heal.ridge import RidgeProblem
from offsite.models.family import Architecture
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT


def solved_layers(family: Architecture, spec: PackSpec) -> tuple[str, ...]:
    """None: the map is no layer of the block."""
    return ()


def solve_block(
    problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
) -> Mapping[str, Tensor]:
    """W (H, H) and b (H,) of the map behind a block, by path in the block, in float64.

    Args:
        problem: the block; the targets are what should leave the map.
        found: tensors of it that have changed before, by path in the block in files.
        spec: the map has no settings.
        pruning: nothing of the map is pruned.
    """
    block, hidden = problem.load(found), problem.targets[0].shape[-1]
    ridge = RidgeProblem(hidden, hidden, len(problem.batches), problem.targets[0].device, bias=True)
    for position, ids in enumerate(problem.batches):
        after = block(ids, problem.enters[position])
        ridge.add(position, after, after, problem.targets[position])
    change = ridge.change()  # (H + 1, H)
    return {AFFINE_WEIGHT: change[:hidden].contiguous(), AFFINE_BIAS: change[hidden].contiguous()}
