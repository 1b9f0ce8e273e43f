"""Makes one block narrower: removes attention heads, then MLP neurons or experts, behind the narrower attention.

To compensate for heads and neurons, only the output projections change. The other weights of the remaining heads and
neurons are those of the base, so an adapter that was trained on the narrower block fits the base too. Remaining experts
do not change here: the router chooses among them, and refit, which comes next, compensates for the removed ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from offsite.config import RefitMap, UnitRule
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.narrow.expert_problem import expert_problem
from offsite.model_owner.narrow.projection_inputs import projection_inputs
from offsite.model_owner.narrow.unit_rule_protocol import ordering
from offsite.models.block_widths import Kept, Widths, narrowed_names, tensor_places
from offsite.models.families.family import Architecture
from offsite.models.mixture import block_in_files


def remove_units(
    problem: BlockProblem, rule: UnitRule, base: Widths, widths: Widths
) -> tuple[Mapping[str, Tensor], Kept]:
    """Remove heads, neurons and experts from a block; output projections change to compensate for heads and neurons.

    Args:
        problem: the block, with its inputs.
        rule: the rule that chooses what is removed.
        base: the block's numbers of heads, neurons and experts in the base.
        widths: these numbers after the removal.

    Returns:
        The tensors that differ from the base's, in float32, keyed by their path in the narrower block; and the indices
        of the heads, neurons and experts that remain.
    """
    family, kept = problem.family, Kept.all_of(base)
    parameters = {name: value.detach() for name, value in problem.load({}).module.named_parameters()}
    whole = block_in_files(family, parameters)
    found: dict[str, Tensor] = {}
    if widths.units < base.units:
        units, projection = _choose(problem, found, rule, "attention", base.unit_heads * base.head_size, widths.units)
        kept = replace(kept, units=units)
        found |= narrowed_tensors(family, whole, base, kept) | projection
    if widths.neurons < base.neurons:
        neurons, projection = _choose(problem, found, rule, "mlp", 1, widths.neurons)
        kept = replace(kept, neurons=neurons)
        found = narrowed_tensors(family, whole, base, kept) | _of_layer(found, family.attention_out) | projection
    if family.experts is not None and widths.experts < base.experts:
        chosen = ordering(rule).order_units(expert_problem(problem, found, family.experts), widths.experts)
        kept = replace(kept, experts=tuple(sorted(set(kept.experts) - set(chosen))))
        found = narrowed_tensors(family, whole, base, kept) | _of_layer(found, family.attention_out)
    return found, kept


def narrowed_tensors(
    family: Architecture, tensors: Mapping[str, Tensor], base: Widths, kept: Kept
) -> dict[str, Tensor]:
    """A block's tensors without the parts of removed heads, neurons and experts, keyed by path in the narrower block.

    Tensors that lose nothing are left out.

    Args:
        family: the model's row of the architecture table.
        tensors: the block's tensors in the base, with the names and layout of checkpoint files.
        base: the block's numbers of heads, neurons and experts in the base.
        kept: the indices of the heads, neurons and experts that remain.
    """
    found = {}
    for name, path in narrowed_names(family, tensors, base, kept).items():
        value, places = tensors[path], tensor_places(family, path, tensors[path].shape, base, kept)
        for axis, stay in enumerate(places):
            if stay is not None:
                value = value.index_select(axis, torch.tensor(stay, device=value.device))
        if name != path or value is not tensors[path]:
            found[name] = value
    return found


def _choose(
    problem: BlockProblem, found: Mapping[str, Tensor], rule: UnitRule, part: RefitMap, size: int, stay: int
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Choose the heads or neurons that remain, and compute the output projection without the others.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block.
        rule: the rule that chooses the units to remove.
        part: "attention" or "mlp".
        size: number of the projection's inputs for each unit.
        stay: number of units that remain.

    Returns:
        The indices of the remaining units, and the projection's weight and bias, keyed by their path in the block.
    """
    inputs, family = projection_inputs(problem, found, (part,))[part], problem.family
    removed = set(ordering(rule).order_units(inputs.problem(size, problem.loss), stay))
    units = tuple(unit for unit in range(inputs.weight.shape[1] // size) if unit not in removed)
    columns: Sequence[int] = [unit * size + one for unit in units for one in range(size)]
    weight, bias = inputs.compensated(columns)
    path = family.output_of(part)[0]
    tensors = {f"{path}.weight": (weight.T if family.transposed else weight).float().contiguous()}
    if bias is not None:
        tensors[f"{path}.bias"] = bias.float()
    return units, tensors


def _of_layer(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weight and bias of the layer at `path`, as far as `tensors` has them."""
    return {name: value for name, value in tensors.items() if name in (f"{path}.weight", f"{path}.bias")}
