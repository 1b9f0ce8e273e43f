"""Refit: kept blocks are re-solved in closed form so that each stands in for the blocks dropped behind it.

For every kept block, the output projection of its MLP is solved anew by ridge regression toward its old weights, so
that the emulator's hidden state after the block is close to the base model's before the next kept block. Compare
ReplaceMe (arXiv 2505.02819), which solves for a map behind the MLP and on the base's activations.
docs/decisions/0004-refit.md has what was measured.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offsite.core.family import Architecture
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.compress.ridge import RidgeProblem
from offsite.model_owner.compress.sparsegpt import pruned_in_order
from offsite.model_owner.split import Work


def refit(
    block: LoadedBlock,
    row: Architecture,
    batches: Sequence[Tensor],
    student: Sequence[Tensor],
    targets: Sequence[Tensor],
    work: Work,
) -> dict[str, Tensor]:
    """New weight (and bias, where there is one) of the linear map that ends the MLP, by path in the block in files.

    Where a block multiplies what the map gives by a learned scale, the problem is solved behind it.

    Args:
        block: the block, its other maps as they will be shipped.
        row: of its family.
        batches: token ids (B, T), or pixels of pictures.
        student: what enters the block in the emulator, (B, T, H) for each batch.
        targets: what should leave it.
        work: whether the map is solved anew, and which share of it is pruned then.
    """
    parameters, transposed = dict(block.module.named_parameters()), row.transposed
    path = row.modules.get(f"{row.mlp_out}.weight", f"{row.mlp_out}.weight").removesuffix(".weight")
    scale_of_map = parameters.get(row.modules.get(row.mlp_scale, row.mlp_scale)) if row.mlp_scale else None
    weight, bias = parameters[f"{path}.weight"].double(), parameters.get(f"{path}.bias")
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    problem = RidgeProblem(inputs, outputs, len(batches), weight.device, bias=bias is not None)
    for position, ids in enumerate(batches):
        with captured_inputs(block, [path]) as seen:
            after = block(ids, student[position])
        problem.add(position, seen[path], after, targets[position])
    columns = inputs + (bias is not None)
    change = problem.change() if work.solves else weight.new_zeros(columns, outputs)  # (F, H)
    if scale_of_map is not None:  # an output that is scaled to next to nothing stays as it is
        by = scale_of_map.double()
        change = change * torch.where(by.abs() > 1e-6 * by.abs().max(), 1 / by, 0.0)
    matrix = (weight.T if transposed else weight) + change[:inputs].T  # (H, F)
    if work.prunes:
        matrix = pruned_in_order(matrix, problem.gram()[:inputs, :inputs], work.prunes)
    solved = {f"{row.mlp_out}.weight": matrix.T if transposed else matrix}
    if bias is not None:
        solved[f"{row.mlp_out}.bias"] = bias.double() + change[inputs]
    return {name: value.detach().contiguous() for name, value in solved.items()}
