"""Refit: kept blocks are re-solved in closed form so that each stands in for the blocks dropped behind it.

For every kept block, the output projection of its MLP, of its attention, or of both in turn, is solved anew by ridge
regression toward the weights that it has, so that the emulator's hidden state after the block is close to the base
model's before the next kept block. While attention's is solved, what the MLP gives is held as it is. Compare ReplaceMe
(arXiv 2505.02819), which solves for a linear map behind the MLP and on the base's activations. Where a block multiplies
the projection's output by a learned scale, the problem is solved behind it. docs/decisions/0004-refit.md has what was
measured.
"""

from collections.abc import Mapping

from torch import Tensor

from offsite.config import PackSpec
from offsite.model_owner.compress.pruner import Pruning
from offsite.model_owner.heal.block_problem import BlockProblem
from offsite.model_owner.heal.output_projection import output_projection
from offsite.models.family import Architecture


def solved_layers(family: Architecture, spec: PackSpec) -> tuple[str, ...]:
    """Paths of the output projections that are solved."""
    return tuple(dict.fromkeys(family.output_of(part)[0] for part in spec.heal.refit_maps))


def solve_block(
    problem: BlockProblem, found: Mapping[str, Tensor], spec: PackSpec, pruning: Pruning | None
) -> Mapping[str, Tensor]:
    """New output projections of a block, each solved on what the ones before it give.

    Args:
        problem: the block.
        found: tensors of it that have changed before, by path in the block in files.
        spec: which projections are solved, in which order.
        pruning: what prunes a projection when its last turn has come.

    Returns:
        Weights and biases in float32, by path in the block in files.
    """
    solved: dict[str, Tensor] = {}
    parts = spec.heal.refit_maps
    for turn, part in enumerate(parts):
        layer = output_projection(problem, {**found, **solved}, part)
        weight, bias = layer.solve()
        if pruning is not None and part not in parts[turn + 1 :]:
            weight = pruning.prune(weight, layer.gram())
        solved |= layer.tensors(weight, bias)
    return solved
