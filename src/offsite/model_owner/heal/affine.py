"""Affine maps: h + h W + b behind each kept block, solved so that it stands in for the blocks dropped behind that.

Targets, order and solver are refit's. Nothing is asked of the block, which stays as it is: the map takes what leaves
it, so it does where a norm follows the MLP too. Compare ReplaceMe (arXiv 2505.02819), which solves for a linear map
behind an MLP, on the base's activations, and merges it into that MLP.
"""

from collections.abc import Sequence

from torch import Tensor

from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.heal.ridge import RidgeProblem
from offsite.models.modules.declared import AFFINE_BIAS, AFFINE_WEIGHT


def affine_map(
    block: LoadedBlock, batches: Sequence[Tensor], student: Sequence[Tensor], targets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """W (H, H) and b (H,) of the map behind a block, by path in the block, in float64.

    Args:
        block: the block.
        batches: token ids (B, T).
        student: what enters the block in the emulator, (B, T, H) for each batch.
        targets: what should leave the map.
    """
    hidden = targets[0].shape[-1]
    problem = RidgeProblem(hidden, hidden, len(batches), targets[0].device, bias=True)
    for position, ids in enumerate(batches):
        after = block(ids, student[position])
        problem.add(position, after, after, targets[position])
    change = problem.change()  # (H + 1, H)
    return {AFFINE_WEIGHT: change[:hidden].contiguous(), AFFINE_BIAS: change[hidden].contiguous()}
