"""Refit: kept blocks are re-solved in closed form so that each stands in for the blocks dropped behind it.

For every kept block, the output projection of its MLP, of its attention, or of both in turn, is solved anew by ridge
regression toward the weights that it has, so that the emulator's hidden state after the block is close to the base
model's before the next kept block. While attention's is solved, what the MLP gives is held as it is. Compare ReplaceMe
(arXiv 2505.02819), which solves for a map behind the MLP and on the base's activations. docs/decisions/0004-refit.md
has what was measured.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from offsite.config import RefitMap
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.compress.sparsegpt import pruned_in_order
from offsite.model_owner.heal.ridge import RidgeProblem
from offsite.model_owner.work import Work
from offsite.models.family import Architecture


def refit(
    load: Callable[[Mapping[str, Tensor]], LoadedBlock],
    pruned: Mapping[str, Tensor],
    row: Architecture,
    batches: Sequence[Tensor],
    student: Sequence[Tensor],
    targets: Sequence[Tensor],
    work: Work,
) -> dict[str, Tensor]:
    """What replaces tensors of a block, by path in the block in files: maps that were pruned before, and solved ones.

    Each map is solved on what the ones before it give. It is pruned when its last turn has come.

    Args:
        load: gives the block with some of its tensors replaced.
        pruned: the block's other maps as they will be shipped, where they are not as in the base.
        row: of its family.
        batches: token ids (B, T), or pixels of pictures.
        student: what enters the block in the emulator, (B, T, H) for each batch.
        targets: what should leave it.
        work: which maps are solved anew, and which share of each is pruned then.
    """
    found = dict(pruned)
    for turn, part in enumerate(work.refits):
        share = 0.0 if part in work.refits[turn + 1 :] else work.prunes
        found |= _refitted(load(found), row, part, batches, student, targets, solves=part in work.solves, prunes=share)
    return found


def _refitted(
    block: LoadedBlock,
    row: Architecture,
    part: RefitMap,
    batches: Sequence[Tensor],
    student: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    solves: bool,
    prunes: float,
) -> dict[str, Tensor]:
    """New weight (and bias, where there is one) of the linear map that ends the MLP or the attention, in float32.

    Where a block multiplies what the map gives by a learned scale, the problem is solved behind it.
    """
    parameters, transposed = dict(block.module.named_parameters()), row.transposed
    name, scale = row.output_of(part)
    path = row.modules.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    scale_of_map = parameters.get(row.modules.get(scale, scale)) if scale else None
    weight, bias = parameters[f"{path}.weight"].double(), parameters.get(f"{path}.bias")
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    problem = RidgeProblem(inputs, outputs, len(batches), weight.device, bias=bias is not None)
    for position, ids in enumerate(batches):
        with captured_inputs(block, [path]) as seen:
            after = block(ids, student[position])
        problem.add(position, seen[path], after, targets[position])
    columns = inputs + (bias is not None)
    change = problem.change() if solves else weight.new_zeros(columns, outputs)  # (F, H)
    if scale_of_map is not None:  # an output that is scaled to next to nothing stays as it is
        by = scale_of_map.double()
        change = change * torch.where(by.abs() > 1e-6 * by.abs().max(), 1 / by, 0.0)
    matrix = (weight.T if transposed else weight) + change[:inputs].T  # (H, F)
    if prunes:
        matrix = pruned_in_order(matrix, problem.gram()[:inputs, :inputs], prunes)
    solved = {f"{name}.weight": matrix.T if transposed else matrix}
    if bias is not None:
        solved[f"{name}.bias"] = bias.double() + change[inputs]
    return {tensor: value.detach().float().contiguous() for tensor, value in solved.items()}
