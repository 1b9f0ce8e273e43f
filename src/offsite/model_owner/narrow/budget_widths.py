"""Divides one budget of multiply-adds over the emulator's blocks: those that matter less become narrower.

Heads and neurons of all blocks compete. The unit whose removal adds the least error for each multiply-add that it saves
goes first, until the budget holds. With convex errors no other widths of that cost have a smaller sum of errors; as in
the allocation of bits by the slope of rate and distortion (Shoham and Gersho 1988). Torch-free.
"""

import math
from collections.abc import Mapping, Sequence

from offsite.config import PackSpec, RefitMap
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes
from offsite.models.block_widths import Widths, multiply_adds, narrowed_shapes

# Errors of blocks are added as if each were measured alone. That holds for small errors, and an almost empty part has a
# large one, so no part gets narrower than this share, unless the budget cannot be met otherwise.
FLOOR = 1 / 8

Errors = Mapping[int, Mapping[RefitMap, Sequence[float]]]


def budget_widths(model: BaseModel, emulator: Sequence[int], errors: Errors, spec: PackSpec) -> tuple[Widths, ...]:
    """The numbers of heads and neurons that remain in each of the emulator's blocks, in the order of `emulator`.

    Together, their linear layers use at most the share `narrow` of the base's multiply-adds in these blocks, and less
    by fewer than the last removed unit uses.

    Args:
        model: the opened base.
        emulator: base indices of the emulator's blocks; `even_widths` must have accepted the settings for them.
        errors: base index of a block -> "attention" or "mlp" -> the error that each further removal adds, in the order
            of removal. A part from which nothing can be removed has no entry.
        spec: the settings, with the share that remains.
    """
    bases = {index: base_widths(model, index) for index in emulator}
    whole = base_multiply_adds(model, emulator)
    costs = {(index, part): _unit_cost(model, index, part) for index in emulator for part in errors[index]}
    units = {key: len(errors[key[0]][key[1]]) + 1 for key in costs}
    excess = whole - (spec.narrow.share or 1) * whole
    floors = {key: math.ceil(FLOOR * count) for key, count in units.items()}
    if sum(costs[key] * (count - floors[key]) for key, count in units.items()) < excess:
        floors = dict.fromkeys(units, 1)
    removals = sorted(
        (error / max(costs[index, part], 1), index, part)
        for index, part in costs
        for error in convex(errors[index][part])[: units[index, part] - floors[index, part]]
    )
    for _, index, part in removals:
        if excess <= 0:
            break
        units[index, part] -= 1
        excess -= costs[index, part]
    return tuple(
        base.narrowed(units.get((index, "attention"), base.units), units.get((index, "mlp"), base.neurons))
        for index, base in bases.items()
    )


def base_multiply_adds(model: BaseModel, blocks: Sequence[int]) -> int:
    """The multiply-adds of the linear layers of some blocks of the base for one token; `blocks` are their indices."""
    shapes = {index: block_shapes(model, index) for index in blocks}
    return sum(multiply_adds(model.family, shapes[index], base_widths(model, index).chosen) for index in blocks)


def convex(added: Sequence[float]) -> list[float]:
    """The added errors, made non-decreasing: a removal that adds less than the one before it gets their common mean.

    So the sums of the result are the lower convex hull of the sums of `added`. A cheap removal that is possible only
    after an expensive one is thus compared by the mean cost of both.

    Args:
        added: the error that each further removal adds, in the order of removal.
    """
    pools: list[tuple[float, int]] = []  # mean and number of removals, with ascending means
    for error in added:
        mean, count = error, 1
        while pools and pools[-1][0] >= mean:
            before, joined = pools.pop()
            mean, count = (before * joined + mean * count) / (joined + count), joined + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _unit_cost(model: BaseModel, index: int, part: RefitMap) -> int:
    """The multiply-adds of one unit of heads ("attention"), or of one neuron ("mlp"), of a block of the base."""
    shapes, base = block_shapes(model, index), base_widths(model, index)
    fewer = (base.units - 1, base.neurons) if part == "attention" else (base.units, base.neurons - 1)
    narrower = narrowed_shapes(model.family, shapes, base, base.narrowed(*fewer))
    return multiply_adds(model.family, shapes) - multiply_adds(model.family, narrower)  # those of experts cancel out
