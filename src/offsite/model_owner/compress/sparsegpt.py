"""SparseGPT: matrices lose numbers one column after the other, and what stays makes up for what goes.

Frantar and Alistarh, arXiv 2301.00774, section 3. Beside their rule, a block's maps are pruned on what enters them in
the emulator, not in the base, and the maps that end MLP or attention are solved anew before they are pruned (`refit`),
so that a block also corrects what the blocks before it left.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offsite.errors import IncompatibleError
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.work import Work
from offsite.models.family import Architecture

COLUMNS = 128  # that are pruned before their errors are passed on to the columns behind them, as published
_TOGETHER = 16  # of these, that pass their errors to each other alone before the rest has them, in the cache
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
    return _pruned(weight, gram.diagonal() == 0, _inverse_factor(gram), share)


def _pruned(weight: Tensor, dead: Tensor, factor: Tensor, share: float) -> Tensor:
    """As `pruned_in_order`, of inputs (inputs,) that are never there, and the others' `_inverse_factor`."""
    outputs, inputs = weight.shape
    left = weight.float().T.clone(memory_format=torch.contiguous_format)  # (inputs, outputs)
    left[dead] = 0  # their numbers go first, at no cost
    gone = 0
    for first in range(0, inputs, COLUMNS):
        last = min(first + COLUMNS, inputs)
        part, own = left[first:last], factor[first:last, first:last]
        count = int(share * outputs * last) - gone
        gone += count
        salience = (part.T / own.diagonal()).square().flatten()  # the squared error that each number's going leaves
        going = _smallest(salience, count).view(outputs, last - first).T.contiguous()
        errors = _errors(part, own, going)
        part.masked_fill_(going, 0)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return left.T


def _errors(part: Tensor, own: Tensor, going: Tensor) -> Tensor:
    """What each number's going is to change in the columns behind; those of `part` (columns, outputs) are changed."""
    errors = torch.zeros_like(part)
    for first in range(0, len(part), _TOGETHER):
        last = min(first + _TOGETHER, len(part))
        for column in range(first, last):
            errors[column] = torch.where(going[column], part[column], 0.0) / own[column, column]
            part[column + 1 : last].addr_(own[column, column + 1 : last], errors[column], alpha=-1)
        part[last:].addmm_(own[first:last, last:].T, errors[first:last], alpha=-1)
    return errors


def _smallest(values: Tensor, count: int) -> Tensor:
    """Where the `count` smallest of the values (n,) are, of equals the earlier."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    largest = values.kthvalue(count).values
    found = values < largest
    equals = (values == largest).nonzero().flatten()
    found[equals[: count - int(found.sum())]] = True
    return found


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
    config: Mapping[str, Any],
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    work: Work,
) -> Mapping[str, Tensor]:
    """Prune the linear maps of a block, all but those that refit goes through.

    Args:
        block: the block.
        row: of its family.
        config: the base's.
        batches: token ids (B, T), or pixels of pictures.
        hidden: what enters the block, (B, T, H) for each batch.
        work: which share of each matrix becomes zero, and which maps are refit's.

    Returns:
        The new matrices, by path in the block in files, in the layout of files.
    """
    refitted = {row.output_of(part)[0] for part in work.refits}
    parameters = dict(block.module.named_parameters())
    found: dict[str, Tensor] = {}
    places: dict[str, list[str]] = {}  # modules -> the maps that are pruned on what enters them
    weights: dict[str, Tensor] = {}  # maps -> their matrices
    for path in row.linears:
        name = row.modules.get(f"{path}.weight", f"{path}.weight")
        if path not in refitted and name in parameters:
            weights[path] = parameters[name].detach()
            place = name.removesuffix(".weight")
            place = place.rpartition(".")[0] if row.is_bypassed(path, config) else place
            places.setdefault(place, []).append(path)
    grams: dict[tuple[str, ...], Tensor] = {}
    for position, ids in enumerate(batches):
        with captured_inputs(block, list(places)) as seen:
            block(ids, hidden[position])
        _require_seen(row, places, seen)
        for together in _readers(seen):
            inputs = seen[together[0]].flatten(0, -2).float()  # (B * T, inputs)
            gram = inputs.T @ inputs
            grams[together] = grams[together] + gram if together in grams else gram
    for together, gram in grams.items():
        dead, factor = gram.diagonal() == 0, _inverse_factor(gram)
        for path in (path for place in together for path in places[place]):
            kept = _pruned(weights[path].T if row.transposed else weights[path], dead, factor, work.prunes)
            found[f"{path}.weight"] = (kept.T if row.transposed else kept).contiguous()
    return found


def _require_seen(row: Architecture, places: Mapping[str, Sequence[str]], seen: Mapping[str, Tensor]) -> None:
    """Refuse a block that takes a map's weight without calling the map: it would stay whole.

    Raises:
        IncompatibleError: it does.
    """
    unseen = [path for place, paths in places.items() if place not in seen for path in paths]
    if unseen:
        raise IncompatibleError(
            f"SparseGPT does not see what enters all maps of this {row.model_type} model",
            reasons=[f"{path} is never called" for path in unseen],
            next_step="pack with --prune-by magnitude and --heal none, or drop blocks with --keep",
        )


def _readers(seen: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The maps in groups that read one and the same tensor."""
    groups: dict[int, list[str]] = {}
    for path, inputs in seen.items():
        groups.setdefault(id(inputs), []).append(path)
    return [tuple(group) for group in groups.values()]
