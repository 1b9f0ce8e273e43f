"""The problem of choosing the experts of a mixture that stay, in the form that the rules of this folder take.

What an expert gives for a token is its output times the router's weight, 0 for a token that does not choose it. It
counts in relation to the block's output, as for heads and neurons. The Gram matrix of what the experts give says both
how much each adds to the hidden state, and what the others could make up for. That a token whose expert is removed goes
through another one instead is not part of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from offsite.model_owner.block_runner import LoadedBlock, captured_routing
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.expert_outputs import RoutedTokens
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem
from offsite.models.family import Experts
from offsite.models.mixture import expert_inner, expert_matrices


def expert_problem(problem: BlockProblem, found: Mapping[str, Tensor], experts: Experts) -> UnitProblem:
    """Run a block over all batches, and sum up the products of what its experts give.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that were changed before, keyed by their path in the block.
        experts: the family's experts, which the block has.

    Returns:
        The problem with a unit for each expert: its Gram matrix holds, for experts i and j, the sum over tokens of
        y_i . y_j / |h|^2, with y what an expert gives and h the block's output.
    """
    block = problem.load(found)
    outputs = [matrices[experts.out] for matrices in expert_matrices(problem.family, _stacks(block, experts))]
    gram = torch.zeros(len(outputs), len(outputs), device=outputs[0].device, dtype=torch.float64)
    for position, ids in enumerate(problem.batches):
        with captured_routing(block, experts.module) as seen:
            after = block(ids, problem.enters[position]).flatten(0, -2)  # (N, H)
        (call,) = seen
        gram += _products(_stacks(block, experts), outputs, RoutedTokens(*call), after.norm(dim=-1, keepdim=True))
    return UnitProblem(gram, torch.ones(1, len(outputs), device=gram.device, dtype=torch.float64), 1)


def _stacks(block: LoadedBlock, experts: Experts) -> torch.nn.Module:
    return block.module.get_submodule(experts.module)


def _products(module: torch.nn.Module, outputs: list[Tensor], routed: RoutedTokens, norms: Tensor) -> Tensor:
    """The sums over the tokens of one batch, (E, E) in float64; norms (N, 1) are those of the block's outputs."""
    count, chosen = len(outputs), routed.chosen.shape[1]
    given = torch.zeros(len(norms), chosen, outputs[0].shape[0], device=norms.device)  # (N, K, H)
    for number, weight in enumerate(outputs):
        tokens, places = torch.where(routed.chosen == number)
        with torch.no_grad():
            inner = expert_inner(module, number, routed.hidden[tokens].float())  # (n, F)
        given[tokens, places] = inner @ weight.T * routed.weights[tokens, places, None].float()
    given /= norms.clamp_min(1e-6)[:, :, None]
    products = (given @ given.mT).double()  # (N, K, K)
    pairs = routed.chosen[:, :, None] * count + routed.chosen[:, None, :]  # (N, K, K)
    sums = products.new_zeros(count * count).index_add_(0, pairs.flatten(), products.flatten())
    return sums.reshape(count, count)
