"""Fits or prunes the last linear layer of each expert in a mixture-of-experts block, one expert after the other.

A block's output is linear in the output of each expert, which the router multiplies by a weight for each token. So each
expert has a least squares problem on the tokens that it processes. Its target is the block's target minus the outputs
of all other experts; those of earlier experts are already changed. The router does not change.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite.model_owner.block_runner import captured_routing
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import RidgeProblem
from offsite.models.families.family import Experts
from offsite.models.mixture import expert_inner, expert_matrices


@dataclass(frozen=True)
class RoutedTokens:
    """The inputs of a block's experts for one batch of N tokens, each of which is processed by K experts."""

    hidden: Tensor  # (N, H)
    chosen: Tensor  # (N, K): indices of experts
    weights: Tensor  # (N, K): factors of these experts' outputs

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The indices (n,) of the tokens that this expert processes, and the factors (n, 1) of its outputs for them."""
        tokens, places = torch.where(self.chosen == expert)
        return tokens, self.weights[tokens, places, None].float()


def routed_tokens(problem: BlockProblem, found: Mapping[str, Tensor], experts: Experts) -> list[RoutedTokens]:
    """Run a block and return the inputs of its experts, one entry for each batch; empty if the block has no experts."""
    block = problem.load(found)
    if experts.module not in dict(block.module.named_modules()):
        return []
    routed = []
    for position, ids in enumerate(problem.batches):
        with captured_routing(block, experts.module) as seen:
            block(ids, problem.enters[position])
        (call,) = seen
        routed.append(RoutedTokens(*call))
    return routed


def change_expert_outputs(
    problem: BlockProblem, found: Mapping[str, Tensor], pruning: Pruning | None, *, solves: bool
) -> dict[str, Tensor]:
    """Fit the last layer of each expert, prune it, or both, one expert after the other.

    Args:
        problem: the block, with its inputs and targets.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        pruning: the pruner, which prunes each layer after it was fitted; None if nothing is pruned.
        solves: whether the layers are fitted to the block's targets.

    Returns:
        The new weights in float32, keyed by their path in the block; empty if the block has no experts.
    """
    experts = problem.family.experts
    block = problem.load(found)
    if experts is None or experts.module not in dict(block.module.named_modules()):
        return {}
    routed, errors = [], []
    for position, ids in enumerate(problem.batches):
        with captured_routing(block, experts.module) as seen:
            after = block(ids, problem.enters[position])
        (call,) = seen
        routed.append(RoutedTokens(*call))
        errors.append((problem.targets[position] - after).flatten(0, -2))  # (N, H)
    module = block.module.get_submodule(experts.module)
    targets = [target.flatten(0, -2) for target in problem.targets]
    solved: dict[str, Tensor] = {}
    for number, matrices in enumerate(expert_matrices(problem.family, module)):
        old = matrices[experts.out].double()  # (H, F)
        ridge = RidgeProblem(old.shape[1], len(old), len(routed), old.device, bias=False)
        inners: list[tuple[Tensor, Tensor]] = []  # for each batch: tokens (n,), and the layer's weighted inputs (n, F)
        for position, batch in enumerate(routed):
            tokens, weights = batch.of(number)
            with torch.no_grad():
                inner = expert_inner(module, number, batch.hidden[tokens].float()) * weights
            inners.append((tokens, inner))
            target, error = targets[position][tokens], errors[position][tokens]
            if len(tokens):
                ridge.add(position, inner, target - error, target)
        new = old + ridge.change().T if solves else old
        if pruning is not None:
            new = pruning.prune(new, ridge.gram()).double()
        change = (new - old).float()
        for position, (tokens, inner) in enumerate(inners):
            errors[position].index_add_(0, tokens, inner @ change.T, alpha=-1)
        solved[f"{experts.path}.{number}.{experts.out}.weight"] = new.float().contiguous()
    return solved
