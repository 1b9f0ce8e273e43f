"""SparseGPT: matrices lose numbers one column after the other, and what stays makes up for what goes.

Frantar and Alistarh, arXiv 2301.00774, section 3. Beside their rule, a block's maps are pruned on what enters them in
the emulator, not in the base, and the maps that end MLP or attention are solved anew before they are pruned (`refit`),
so that a block also corrects what the blocks before it left.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offsite.core.family import Architecture
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.split import Work

COLUMNS = 128  # that are pruned before their errors are passed on to the columns behind them, as published
DAMPING = 0.01  # times the mean of the Gram matrix's diagonal, as published


def pruned_in_order(weight: Tensor, gram: Tensor, share: float) -> Tensor:
    """A matrix without `share` of its numbers, the rest changed so that its products with the inputs change least.

    Args:
        weight: (outputs, inputs).
        gram: sum over the inputs of x x^T, (inputs, inputs).
        share: exactly floor(share * size) numbers become zero.

    Returns:
        (outputs, inputs) in float32.
    """
    outputs, inputs = weight.shape
    factor = _inverse_factor(gram)  # (inputs, inputs), upper
    left = weight.float().clone()
    left[:, gram.diagonal() == 0] = 0  # inputs that are never there: their numbers go first, at no cost
    gone = 0
    for first in range(0, inputs, COLUMNS):
        last = min(first + COLUMNS, inputs)
        part, own = left[:, first:last].clone(), factor[first:last, first:last]
        count = int(share * outputs * last) - gone
        gone += count
        salience = (part / own.diagonal()).square().flatten()  # the squared error that each number's going leaves
        going = torch.zeros_like(salience, dtype=torch.bool)
        going[salience.argsort(stable=True)[:count]] = True
        going = going.view_as(part)
        errors = torch.zeros_like(part)
        for column in range(last - first):
            lost = torch.where(going[:, column], part[:, column], 0.0) / own[column, column]
            part[:, column:] -= lost[:, None] * own[column, column:]
            errors[:, column] = lost
        left[:, first:last] = part.masked_fill(going, 0)
        left[:, last:] -= errors @ factor[first:last, last:]
    return left


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Gram matrix's inverse, in float32; solved in float64."""
    system = gram.double()
    dead = system.diagonal() == 0
    system.diagonal()[dead] = 1
    system.diagonal().add_(DAMPING * system.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def prune_maps(
    block: LoadedBlock,
    row: Architecture,
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    work: Work,
) -> Mapping[str, Tensor]:
    """Prune the linear maps of a block, all but those that refit goes through.

    Args:
        block: the block.
        row: of its family.
        batches: token ids (B, T), or pixels of pictures.
        hidden: what enters the block, (B, T, H) for each batch.
        work: which share of each matrix becomes zero, and which maps are refit's.

    Returns:
        The new matrices, by path in the block in files, in the layout of files.
    """
    refitted = {row.output_of(part)[0] for part in work.refits}
    weights = {path: f"{path}.weight" for path in row.linears if path not in refitted}
    places = {path: row.modules.get(name, name).removesuffix(".weight") for path, name in weights.items()}
    grams: dict[tuple[str, ...], Tensor] = {}
    for position, ids in enumerate(batches):
        with captured_inputs(block, list(places.values())) as seen:
            block(ids, hidden[position])
        for together in _readers(seen):
            inputs = seen[together[0]].flatten(0, -2).float()  # (B * T, inputs)
            gram = inputs.T @ inputs
            grams[together] = grams[together] + gram if together in grams else gram
    parameters = dict(block.module.named_parameters())
    found = {}
    for path, place in places.items():
        matrix = parameters[f"{place}.weight"].detach()
        gram = next(gram for together, gram in grams.items() if place in together)
        kept = pruned_in_order(matrix.T if row.transposed else matrix, gram, work.prunes)
        found[weights[path]] = (kept.T if row.transposed else kept).contiguous()
    return found


def _readers(seen: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The maps in groups that read one and the same tensor."""
    groups: dict[int, list[str]] = {}
    for path, inputs in seen.items():
        groups.setdefault(id(inputs), []).append(path)
    return [tuple(group) for group in groups.values()]
