"""Computes how many attention heads, MLP neurons and experts remain in each block of the emulator.

The settings give the fraction of heads, neurons and experts that remains, or of the multiply-adds of a block's linear
layers for one token. It is the same for every block. The router chooses as many experts for a token as before, so fewer
experts save size and memory, but no multiply-adds. Torch-free.
"""

import math
from collections.abc import Callable, Sequence

from offsite.config import PackSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.models.block_widths import Shapes, Widths, multiply_adds, narrowed_shapes, obstacles, widths_of

_OF_MIXTURES = ": --narrow-experts removes whole experts, which saves size and memory"


def block_shapes(model: BaseModel, index: int) -> Shapes:
    """The shapes of the tensors of a base block, keyed by path in the block, such as "mlp.up_proj.weight"."""
    return {path: tensor.shape for path, tensor in model.block(index).items()}


def base_widths(model: BaseModel, index: int) -> Widths:
    """The numbers of attention heads, MLP neurons and experts of the base's block with this index.

    Raises:
        IncompatibleError: the config does not say how many heads the block has.
    """
    return widths_of(model.family, model.config, block_shapes(model, index))


def even_widths(model: BaseModel, emulator: Sequence[int], spec: PackSpec) -> tuple[Widths, ...]:
    """The numbers of heads, neurons and experts that remain in each of the emulator's blocks, in their order.

    Args:
        model: the opened base.
        emulator: base indices of the emulator's blocks.
        spec: the settings of narrowing; at least one must be set.

    Raises:
        IncompatibleError: nothing can be removed from the family's blocks, or the config does not say how many heads
            they have.
        UsageError: blocks cannot get as narrow as the settings ask, or fewer experts would remain than the router
            chooses for a token.
    """
    return tuple(_widths(model, index, spec) for index in emulator)


def require_narrower(model: BaseModel, emulator: Sequence[int], spec: PackSpec) -> None:
    """Raise an error if blocks cannot get as narrow as the settings ask, or if nothing would be removed from any block.

    Raises:
        IncompatibleError: as for `even_widths`.
        UsageError: as for `even_widths`; or nothing would be removed from any block.
    """
    base = [base_widths(model, index) for index in emulator]
    if list(even_widths(model, emulator, spec)) == base:
        parts = {
            "key-value heads" if base[0].grouped else "query heads": base[0].units,
            "neurons": base[0].neurons,
            "experts": base[0].experts,
        }
        raise UsageError(
            f"{_flags(spec)} would remove nothing",
            reasons=["a block has " + ", ".join(f"{count} {part}" for part, count in parts.items() if count)],
            next_step=f"leave {_flags(spec)} out, or choose a smaller share",
        )


def _widths(model: BaseModel, index: int, spec: PackSpec) -> Widths:
    """The numbers of heads, neurons and experts that remain in the base block `index`; see `even_widths`."""
    shapes, base = block_shapes(model, index), base_widths(model, index)
    whole = obstacles(model.family, model.config, shapes)
    if {"heads", "neurons", "experts"} <= whole.keys():
        raise IncompatibleError(
            f"the blocks of this {model.family.model_type} model cannot be made narrower",
            reasons=[f"{part}: {why}" for part, why in whole.items()],
            next_step=f"leave {_flags(spec)} out; dropping blocks with --keep and pruning work with every family",
        )
    asked = {"heads": spec.narrow.heads, "neurons": spec.narrow.neurons, "experts": spec.narrow.experts}
    for part, share in asked.items():
        if share is not None and share < 1 and part in whole:
            raise IncompatibleError(
                f"the {part} of this {model.family.model_type} model cannot be removed",
                reasons=[whole[part]],
                next_step={
                    "heads": "leave --narrow-heads out",
                    "neurons": f"leave --narrow-neurons out{_OF_MIXTURES if model.family.experts else ''}",
                    "experts": "leave --narrow-experts out",
                }[part],
            )
    if spec.narrow.share is not None:
        return _for_share(model, shapes, base, frozenset(whole), spec.narrow.share)
    units = max(1, round((asked["heads"] or 1) * base.units))
    neurons = min(base.neurons, max(1, round((asked["neurons"] or 1) * base.neurons)))
    return base.narrowed(units, neurons, _experts(base, asked["experts"]))


def _experts(base: Widths, share: float | None) -> int:
    """The number of experts that remain in a block; 0 if it has none.

    Args:
        base: the block's widths in the base.
        share: the fraction of experts that remains; None means all.

    Raises:
        UsageError: fewer experts would remain than the router chooses for a token.
    """
    stay = base.experts if share is None else round(share * base.experts)
    if stay < base.chosen:
        raise UsageError(
            f"--narrow-experts {share:g} leaves too few experts",
            reasons=[f"{stay} of {base.experts} would stay, and a token goes through {base.chosen}"],
            next_step=f"choose --narrow-experts {base.chosen / base.experts:.3g} or more",
        )
    return stay


def _flags(spec: PackSpec) -> str:
    """The flags of narrowing that are set, for an error message, such as "--narrow-heads and --narrow-neurons"."""
    given = {
        "--narrow": spec.narrow.share,
        "--narrow-heads": spec.narrow.heads,
        "--narrow-neurons": spec.narrow.neurons,
        "--narrow-experts": spec.narrow.experts,
    }
    return " and ".join(flag for flag, share in given.items() if share is not None)


def _for_share(model: BaseModel, shapes: Shapes, base: Widths, whole: frozenset[str], share: float) -> Widths:
    """The widths whose cost is closest to a fraction of the block's multiply-adds, without being above it.

    Among these, the fractions of heads and neurons that remain are the most similar.

    Args:
        model: the opened base.
        shapes: the shapes of the block's tensors, keyed by path in the block.
        base: the block's widths in the base.
        whole: "heads" or "neurons", if none of these can be removed.
        share: the fraction of multiply-adds that remains.
    """

    def cost(units: int, neurons: int) -> int:
        narrower = base.narrowed(units, neurons)
        return multiply_adds(model.family, narrowed_shapes(model.family, shapes, base, narrower), base.chosen)

    budget = share * cost(base.units, base.neurons)
    found: list[tuple[tuple[bool, float], Widths]] = []
    for units in [base.units] if "heads" in whole else range(1, base.units + 1):
        if "neurons" in whole:
            if cost(units, base.neurons) <= budget:
                found.append(((False, 1 - units / base.units), base.narrowed(units, base.neurons)))
            continue
        of_one = cost(units, 1) - cost(units, 0)
        neurons = min(base.neurons, 1 + math.floor((budget - cost(units, 1)) / of_one))
        if neurons >= 1:
            unused = budget - cost(units, neurons) >= of_one
            uneven = abs(units / base.units - neurons / base.neurons)
            found.append(((unused, uneven), base.narrowed(units, neurons)))
    if not found:
        raise _too_narrow(model, shapes, cost, base, share)
    return min(found, key=lambda one: one[0])[1]


def _too_narrow(
    model: BaseModel, shapes: Shapes, cost: Callable[[int, int], int], base: Widths, share: float
) -> UsageError:
    """The error for a fraction of a block's multiply-adds that is smaller than the narrowest block needs.

    `cost` returns the multiply-adds of a block with a number of head units and a number of neurons.
    """
    whole = obstacles(model.family, model.config, shapes)
    units, neurons = base.units if "heads" in whole else 1, base.neurons if "neurons" in whole else 1
    least = cost(units, neurons) / cost(base.units, base.neurons)
    left = [*(["one neuron"] if neurons == 1 else []), *(["the fewest heads"] if units == 1 else [])]
    return UsageError(
        f"--narrow {share:g} is less than a block can be narrowed to",
        reasons=[
            f"with {' and '.join(left) or 'all that stays'} it still has {least:.2f}",
            *(f"{part} stay: {why}" for part, why in whole.items() if part != "experts"),
        ],
        next_step="choose a larger share" if model.family.experts is None else f"leave --narrow out{_OF_MIXTURES}",
    )
