"""Sets up the choice of which experts of a mixture to remove, as input for the unit rules of this folder.

An expert's contribution to a token is its output times the router's weight, or 0 if the router does not choose it. It
is divided by the norm of the block's output, as for heads and neurons. The Gram matrix of the contributions shows how
much each expert adds to the hidden state, and how far the others could compensate for its loss. That the router sends
the tokens of a removed expert to another one is not taken into account.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from offsite.model_owner.block_runner import LoadedBlock, captured_routing
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.expert_outputs import RoutedTokens
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem
from offsite.models.families.family import Experts
from offsite.models.mixture import expert_inner, expert_matrices


def expert_problem(problem: BlockProblem, found: Mapping[str, Tensor], experts: Experts) -> UnitProblem:
    """Run a block over all batches, and compute the Gram matrix of its experts' contributions to the hidden state.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block.
        experts: the family's description of the experts; the block must have some.

    Returns:
        The input of a unit rule, in which each expert is a unit. Its Gram matrix has, for experts i and j, the sum over
        tokens of y_i . y_j / |h|^2; y_i is the output of expert i times the router's weight, h the block's output.
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
    """The block's torch module whose parameters are the stacked matrices of all experts."""
    return block.module.get_submodule(experts.module)


def _products(module: torch.nn.Module, outputs: list[Tensor], routed: RoutedTokens, norms: Tensor) -> Tensor:
    """The Gram matrix of the contributions of E experts for one batch, (E, E) in float64.

    Args:
        module: the experts' torch module.
        outputs: the weight of each expert's last linear layer, (H, F).
        routed: the inputs of the experts.
        norms: the norms of the block's outputs, (N, 1).
    """
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
