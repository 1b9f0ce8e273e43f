"""Pruning a block's linear layers using their inputs: the part that all calibrated pruners share."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from offsite.config import RefitMap
from offsite.errors import IncompatibleError
from offsite.model_owner.block_runner import captured_inputs
from offsite.model_owner.compress.pruner_protocol import Pruning
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.output_projection import output_projection
from offsite.models.family import Architecture


def prune_layers(
    problem: BlockProblem, found: Mapping[str, Tensor], pruning: Pruning, spared: Collection[str]
) -> Mapping[str, Tensor]:
    """Prune the linear layers of a block; each is calibrated on its inputs in the unpruned block.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        pruning: the pruner, and the fraction of each matrix that becomes zero.
        spared: paths of layers that are pruned in another step.

    Returns:
        The new matrices, keyed by their path in the block, in names and layout of checkpoint files.

    Raises:
        IncompatibleError: the block reads a layer's weight without calling the layer.
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
        _require_seen(pruning, family, places, seen)
        for readers in _readers(seen):
            of_batch = pruning.pruner.sum_inputs(seen[readers[0]].flatten(0, -2).float())
            sums[readers] = sums[readers] + of_batch if readers in sums else of_batch
    pruned: dict[str, Tensor] = {}
    for readers, total in sums.items():
        layers = [path for place in readers for path in places[place]]
        pruned |= pruning.pruner.prune_matrices({path: weights[path] for path in layers}, total, pruning.share)
    return {
        f"{path}.weight": (weight.T if family.transposed else weight).contiguous() for path, weight in pruned.items()
    }


def prune_output(
    problem: BlockProblem, found: Mapping[str, Tensor], pruning: Pruning, part: RefitMap
) -> Mapping[str, Tensor]:
    """Prune the output projection of a block's MLP or attention, on its inputs in the block as changed so far.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block, as checkpoint files
            name it.
        pruning: the pruner, and the fraction of the matrix that becomes zero.
        part: "mlp" or "attention".

    Returns:
        The new weight, and the bias if there is one; keys are paths in the block, as checkpoint files name them.
    """
    layer = output_projection(problem, found, part)
    return layer.tensors(pruning.prune(layer.weight, layer.gram()), layer.bias)


def _require_seen(
    pruning: Pruning, family: Architecture, places: Mapping[str, Sequence[str]], seen: Mapping[str, Tensor]
) -> None:
    """Raise an error if a block uses a layer's weight without calling the layer.

    The inputs of such a layer are not recorded, so it would stay unpruned.

    Raises:
        IncompatibleError: a layer was never called.
    """
    unseen = [path for place, paths in places.items() if place not in seen for path in paths]
    if unseen:
        raise IncompatibleError(
            f"prune_by = {pruning.row.name} does not see what enters all linear layers of this {family.model_type} "
            "model",
            reasons=[f"{path} is never called" for path in unseen],
            next_step="pack with --prune-by magnitude and --heal none, or drop blocks with --keep",
        )


def _readers(seen: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The modules' paths, grouped so that the modules of a group have the same input tensor."""
    groups: dict[int, list[str]] = {}
    for path, inputs in seen.items():
        groups.setdefault(id(inputs), []).append(path)
    return [tuple(group) for group in groups.values()]
