"""Fits and prunes the last linear layers of a block's MLP or attention: one layer, or those of all experts."""

from collections.abc import Mapping

from torch import Tensor

from offsite.config import RefitMap
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.expert_outputs import change_expert_outputs
from offsite.model_owner.heal.gradient_refit import follow_gradient
from offsite.model_owner.heal.held_solution import solve_in_front_of_norms
from offsite.model_owner.heal.output_projection import output_projection


def change_outputs(
    problem: BlockProblem, found: Mapping[str, Tensor], part: RefitMap, pruning: Pruning | None, *, solves: bool
) -> dict[str, Tensor]:
    """Fit the last linear layers of a block's MLP or attention, prune them, or both, one layer after the other.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        part: "mlp" or "attention".
        pruning: the pruner, which prunes each layer after it was fitted; None if nothing is pruned.
        solves: whether the layers are fitted, so that the block's output comes close to its targets.

    Returns:
        The new weights and biases in float32; keys are paths in the block, as checkpoint files name them.
    """
    family, changed = problem.family, dict[str, Tensor]()
    for path in family.output_layers(part):
        if "*" in path:
            known = family.refit_way(part, problem.config) == "expert by expert"
            changed |= change_expert_outputs(problem, {**found, **changed}, pruning, solves=solves and known)
        elif f"{path}.weight" in problem.paths:
            layer = output_projection(problem, {**found, **changed}, part, path)
            weight, bias = layer.weight, layer.bias
            if solves and not layer.linear:
                weight, bias = follow_gradient(problem, {**found, **changed}, layer)
            elif solves and layer.held:
                weight, bias = solve_in_front_of_norms(problem, {**found, **changed}, layer)
            elif solves:
                weight, bias = layer.solve()
            if pruning is not None:
                weight = pruning.prune(weight, layer.gram())
            changed |= layer.tensors(weight, bias)
    return changed
