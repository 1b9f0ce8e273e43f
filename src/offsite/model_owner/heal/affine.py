"""Affine layers: h + h W + b after each kept block, fitted to replace the dropped blocks that follow it in the base.

Targets, order of blocks and solver are as in refit (`refit.py`). The weights of the block itself do not change, so this
also works for families with a norm after the MLP. Compare ReplaceMe (arXiv 2505.02819), which solves for a linear map
after an MLP, on the base's activations, and merges it into that MLP.
"""

from collections.abc import Mapping

from torch import Tensor

from offsite.config import PackSpec
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import RidgeProblem
from offsite.models.families.family import Architecture
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT


def solved_layers(family: Architecture, spec: PackSpec) -> tuple[str, ...]:
    """Return an empty tuple, as this step solves none of the block's own linear layers."""
    return ()


def solve_block(
    problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
) -> Mapping[str, Tensor]:
    """Solve for the affine layer after a block.

    Args:
        problem: the block; its target outputs are those of the affine layer.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        spec: unused, since the affine layer has no settings.
        pruning: unused, since the affine layer is not pruned.

    Returns:
        W (H, H) and b (H,) in float64, keyed by their paths in the block.
    """
    block, hidden = problem.load(found), problem.targets[0].shape[-1]
    ridge = RidgeProblem(hidden, hidden, len(problem.batches), problem.targets[0].device, bias=True)
    for position, ids in enumerate(problem.batches):
        after = block(ids, problem.enters[position])
        ridge.add(position, after, after, problem.targets[position])
    change = ridge.change()  # (H + 1, H)
    return {AFFINE_WEIGHT: change[:hidden].contiguous(), AFFINE_BIAS: change[hidden].contiguous()}
