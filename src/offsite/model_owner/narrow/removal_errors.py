"""Measures how much error the removal of more and more heads and neurons adds in each block, for a budget over blocks.

One pass over the base's blocks on the calibration data. An error is a sum over tokens of the squared change of the
hidden state, relative to its squared norm, after the remaining units compensated by least squares; so errors of
different blocks can be compared.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from offsite.config import PackSpec, RefitMap
from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.unsolvable import explain_unsolvable
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes
from offsite.model_owner.narrow.loss_statistics import LossStatistics
from offsite.model_owner.narrow.obs import damped
from offsite.model_owner.narrow.projection_inputs import projection_inputs
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem, ordering
from offsite.models.block_widths import obstacles
from offsite.progress import Event, Progress


def removal_errors(
    model: BaseModel,
    blocks: Sequence[int],
    spec: PackSpec,
    progress: Progress,
    *,
    statistics: Mapping[int, LossStatistics] | None = None,
    batches: Sequence[Tensor] | None = None,
) -> dict[int, dict[RefitMap, list[float]]]:
    """The error that each further removal adds, in the order in which the rule of the settings removes units.

    Args:
        model: the opened base; its blocks are loaded one at a time.
        blocks: base indices of the blocks to measure.
        spec: the settings, with the rule that orders heads and neurons, and the calibration data.
        progress: receives the progress events.
        statistics: how the base's loss depends on each block, by base index; None for rules that do not need it.
        batches: token ids (B, T) to use instead of the calibration data of `spec`.

    Returns:
        Base index of a block -> "attention" or "mlp" -> the added errors; all units but the last are removed. A part
        from which nothing can be removed has no entry.

    Raises:
        DataError: the calibration text is unreadable or too short.
        IncompatibleError: activations of the base are not finite.
    """
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    runner = BlockRunner(model, machine)
    if batches is None:
        batches = calibration_batches(model, spec.calibration.source, spec.calibration.tokens, row_form(spec))
    batches = [ids.to(machine.device) for ids in batches]
    hidden = [runner.load(0).embed(ids) for ids in batches]
    found: dict[int, dict[RefitMap, list[float]]] = {}
    end = max(blocks) + 1
    for index in range(end):
        progress(Event("measuring the blocks' sensitivity", index, end))
        block = runner.load(index)
        after = [block(ids, hidden[position]) for position, ids in enumerate(batches)]
        if index in blocks:
            paths = model.block(index).keys()
            load = partial(runner.load, index)
            loss = statistics[index] if statistics else None
            problem = BlockProblem(load, model.family, model.config, batches, hidden, after, paths, loss)
            with explain_unsolvable(index):
                found[index] = _block_errors(model, index, problem, spec)
        hidden = after
    return found


def added_errors(problem: UnitProblem, order: Sequence[int]) -> list[float]:
    """The error that each removal adds, if the remaining units compensate for all removals by least squares.

    X are the inputs of the output projection W, H = X^T X + damping = L L^T with the removed units last, in reverse
    order. Column j of W L is what the input j adds to the output beyond the inputs before it, so its squared norm is
    the error that its removal adds.

    Args:
        problem: the output projection with its inputs' Gram matrix.
        order: the removed units, in the order of removal; at least one unit stays.
    """
    gone = set(order)
    sequence = [*(unit for unit in range(problem.units) if unit not in gone), *reversed(order)]
    size, device = problem.size, problem.gram.device
    columns = (torch.tensor(sequence, device=device)[:, None] * size + torch.arange(size, device=device)).flatten()
    factor = torch.linalg.cholesky(damped(problem.gram)[columns][:, columns])  # (F, F)
    added = (problem.weighted[:, columns] @ factor).square().sum(0)  # (F,)
    by_unit: list[float] = added.reshape(-1, size).sum(1).flip(0).tolist()
    return by_unit[: len(order)]


def _block_errors(model: BaseModel, index: int, problem: BlockProblem, spec: PackSpec) -> dict[RefitMap, list[float]]:
    """The added errors of one block's attention and MLP, see `removal_errors`.

    Args:
        model: the opened base.
        index: the block's index in the base.
        problem: the block with its inputs, and with its outputs as targets.
        spec: the settings, with the rule that orders heads and neurons.
    """
    base = base_widths(model, index)
    whole = obstacles(model.family, model.config, block_shapes(model, index))
    sizes: dict[RefitMap, int] = {"attention": base.unit_heads * base.head_size, "mlp": 1}
    names: dict[RefitMap, str] = {"attention": "heads", "mlp": "neurons"}
    parts = [part for part, unit in names.items() if unit not in whole]
    found: dict[RefitMap, list[float]] = {}
    for part, inputs in projection_inputs(problem, {}, parts).items():
        units = inputs.problem(sizes[part], problem.loss)
        errors = added_errors(units, ordering(spec.unit_rule).order_units(units, 1))
        if problem.family.refit_way(part, problem.config) != "in closed form":
            share = _share_of_output(model, index, problem, part)
            errors = [share * error for error in errors]
        found[part] = errors
    return found


def _share_of_output(model: BaseModel, index: int, problem: BlockProblem, part: RefitMap) -> float:
    """How much of a block's output goes if a part of it gives nothing: mean over tokens of squared change / norm.

    Where a norm follows a projection, `projection_inputs` counts errors relative to the projection's own output. Their
    product with this share is relative to the hidden state, as errors of other projections are.

    Args:
        model: the opened base.
        index: the block's index in the base.
        problem: the block with its inputs, and with its outputs as targets.
        part: "attention" or "mlp".
    """
    path, tensors = problem.family.output_of(part)[0], model.block(index)
    names = [name for name in (f"{path}.weight", f"{path}.bias") if name in tensors]
    silent = problem.load({name: torch.zeros(tensors[name].shape) for name in names})
    shares = []
    for position, ids in enumerate(problem.batches):
        target = problem.targets[position]
        change = (silent(ids, problem.enters[position]) - target).square().sum(-1)
        shares.append((change / target.square().sum(-1).clamp_min(1e-12)).flatten())
    return float(torch.cat(shares).mean())
