"""Prunes a block's linear layers with a calibrated pruner, which needs statistics of each layer's inputs."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from offsite.model_owner.block_runner import captured_inputs
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.expert_outputs import routed_tokens
from offsite.models.mixture import expert_inner, expert_matrices


def prune_layers(
    problem: BlockProblem, found: Mapping[str, Tensor], pruning: Pruning, spared: Collection[str]
) -> Mapping[str, Tensor]:
    """Prune the linear layers of a block; each is calibrated on its inputs in the unpruned block.

    If the block uses a layer's weight without calling the layer, its inputs are unknown, and magnitude pruning is used.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        pruning: the pruner, and the fraction of each matrix that becomes zero.
        spared: paths in the block of the layers that another step prunes.

    Returns:
        The new matrices, keyed by their path in the block, with the names and layout of checkpoint files.
    """
    family, block = problem.family, problem.load(found)
    parameters = dict(block.module.named_parameters())
    places: dict[str, list[str]] = {}  # module path -> paths of the layers that read its inputs
    weights: dict[str, Tensor] = {}  # layer path -> matrix (outputs, inputs)
    for path in family.linears:
        name = family.modules.get(f"{path}.weight", f"{path}.weight")
        if path not in spared and name in parameters:
            weight = parameters[name].detach()
            weights[path] = weight.T if family.transposed else weight
            place = name.removesuffix(".weight")
            place = place.rpartition(".")[0] if family.is_bypassed(path, problem.config) else place
            places.setdefault(place, []).append(path)
    sums: dict[tuple[str, ...], Tensor] = {}  # module paths with equal inputs -> statistics of the inputs
    for position, ids in enumerate(problem.batches):
        with captured_inputs(block, list(places)) as seen:
            block(ids, problem.enters[position])
        for readers in _readers(seen):
            of_batch = pruning.pruner.sum_inputs(seen[readers[0]].flatten(0, -2).float())
            sums[readers] = sums[readers] + of_batch if readers in sums else of_batch
    pruned: dict[str, Tensor] = {}
    for readers, total in sums.items():
        layers = [path for place in readers for path in places[place]]
        pruned |= pruning.prune_matrices({path: weights[path] for path in layers}, total)
    unseen = {path: weight for path, weight in weights.items() if path not in pruned}
    pruned |= pruning.prune_matrices(unseen, None)
    files = {
        f"{path}.weight": (weight.T if family.transposed else weight).contiguous() for path, weight in pruned.items()
    }
    return files | _pruned_experts(problem, found, pruning, spared)


def _readers(seen: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Group modules that have the same input tensor.

    Args:
        seen: the input of each module, keyed by the module's path.

    Returns:
        The paths of each group.
    """
    groups: dict[int, list[str]] = {}
    for path, inputs in seen.items():
        groups.setdefault(id(inputs), []).append(path)
    return [tuple(group) for group in groups.values()]


def _pruned_experts(
    problem: BlockProblem, found: Mapping[str, Tensor], pruning: Pruning, spared: Collection[str]
) -> dict[str, Tensor]:
    """Prune the experts of a mixture; each is calibrated on the tokens that the router sends to it.

    Arguments as for `prune_layers`.

    Returns:
        The new matrices, keyed by their path in the block; empty if the block has no experts.
    """
    experts = problem.family.experts
    routed = [] if experts is None else routed_tokens(problem, found, experts)
    if experts is None or not routed:
        return {}
    module = problem.load(found).module.get_submodule(experts.module)
    pruned: dict[str, Tensor] = {}
    for number, matrices in enumerate(expert_matrices(problem.family, module)):
        start = f"{experts.path}.{number}."
        enters = [batch.hidden[batch.of(number)[0]].float() for batch in routed]  # (n, H) each
        groups = {path: weight for path, weight in matrices.items() if path != experts.out}
        pruned |= _pruned_group(start, groups, enters, pruning)
        if f"{experts.path}.*.{experts.out}" not in spared:
            with torch.no_grad():
                inner = [expert_inner(module, number, tokens) for tokens in enters]  # (n, F) each
            pruned |= _pruned_group(start, {experts.out: matrices[experts.out]}, inner, pruning)
    return pruned


def _pruned_group(
    start: str, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], pruning: Pruning
) -> dict[str, Tensor]:
    """Prune linear layers of an expert that have the same inputs.

    Args:
        start: the expert's path in the block, with a dot at its end.
        weights: the matrices (outputs, I), keyed by the layer's path in the expert.
        inputs: the inputs of the layers, (n, I) for each batch.
        pruning: the pruner, and the fraction of each matrix that becomes zero.

    Returns:
        The new matrices, keyed by their path in the block.
    """
    seen = [pruning.pruner.sum_inputs(rows) for rows in inputs if len(rows)]
    pruned = pruning.prune_matrices(weights, torch.stack(seen).sum(0) if seen else None)
    return {f"{start}{path}.weight": weight.contiguous() for path, weight in pruned.items()}
