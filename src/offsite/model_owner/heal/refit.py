"""Refit: new weights for kept blocks, so that each also does the work of the dropped blocks that follow it in the base.

In every kept block, the output projection of the MLP, of the attention, or of both in turn, is fitted by ridge
regression. The target is the base's hidden state before the next kept block; the penalty is on the change of the
weights. While attention's projection is fitted, the MLP's output is treated as constant. Compare ReplaceMe
(arXiv 2505.02819), which solves for a linear map after the MLP, on the base's activations.

If the block multiplies the projection's output by a learned scale, the fit takes it into account. The statistics of a
norm after the projection are treated as constants. The last layers of experts are fitted one after the other. If the
family's row does not say that the block's output is linear in the projection's output, the response is measured, or
refit uses the gradient. Measurements are in docs/decisions/0004-refit.md.
"""

from collections.abc import Mapping

from torch import Tensor

from offsite.config import PackSpec
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.output_layers import change_outputs
from offsite.models.families.family import Architecture


def solved_layers(family: Architecture, spec: PackSpec) -> tuple[str, ...]:
    """Paths in a block of the output projections whose weights refit fits."""
    return tuple(dict.fromkeys(path for part in spec.heal.refit_maps for path in family.output_layers(part)))


def solve_block(
    problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
) -> Mapping[str, Tensor]:
    """Fit the output projections of a block in turn, each with the projections before it already replaced.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        spec: the settings, with the projections to fit and their order.
        pruning: the pruner, which prunes each projection after it is fitted for the last time; None if there is none.

    Returns:
        The new weights and biases in float32; keys are paths in the block, as checkpoint files name them.
    """
    solved: dict[str, Tensor] = {}
    parts = spec.heal.refit_maps
    for turn, part in enumerate(parts):
        last = part not in parts[turn + 1 :]
        solved |= change_outputs(problem, {**found, **solved}, part, pruning if last else None, solves=True)
    return solved
