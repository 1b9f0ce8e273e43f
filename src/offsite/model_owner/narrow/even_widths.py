"""Computes how many attention heads and MLP neurons remain in each block of the emulator.

The settings give the fraction of heads and of neurons that remains, or of the multiply-adds of a block's linear layers.
It is the same for every block. Torch-free.
"""

import math
from collections.abc import Sequence

from offsite.config import PackSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.models.block_widths import Shapes, Widths, multiply_adds, narrowed_shapes, obstacles, widths_of


def block_shapes(model: BaseModel, index: int) -> Shapes:
    """The shapes of the tensors of a base block, keyed by path in the block, such as "mlp.up_proj.weight"."""
    return {path: tensor.shape for path, tensor in model.block(index).items()}


def base_widths(model: BaseModel, index: int) -> Widths:
    """The numbers of attention heads and MLP neurons of the base's block with this index.

    Raises:
        IncompatibleError: the config does not say how many heads the block has.
    """
    return widths_of(model.family, model.config, block_shapes(model, index))


def even_widths(model: BaseModel, emulator: Sequence[int], spec: PackSpec) -> tuple[Widths, ...]:
    """The numbers of heads and neurons that remain in each of the emulator's blocks, in the order of `emulator`.

    Args:
        model: the opened base.
        emulator: base indices of the emulator's blocks.
        spec: the settings of narrowing; at least one must be set.

    Raises:
        IncompatibleError: nothing can be removed from the family's blocks, or the config does not say how many heads
            they have.
        UsageError: blocks cannot get as narrow as the settings ask.
    """
    return tuple(_widths(model, index, spec) for index in emulator)


def _widths(model: BaseModel, index: int, spec: PackSpec) -> Widths:
    """The numbers of heads and neurons that remain in one block, see `even_widths`; `index` is its base index."""
    shapes, base = block_shapes(model, index), base_widths(model, index)
    whole = obstacles(model.family, model.config, shapes)
    if "heads" in whole and "neurons" in whole:
        raise IncompatibleError(
            f"the blocks of this {model.family.model_type} model cannot be made narrower",
            reasons=[f"{part}: {why}" for part, why in whole.items()],
            next_step=f"leave {_flags(spec)} out; dropping blocks with --keep and pruning work with every family",
        )
    asked = {"heads": spec.narrow.heads, "neurons": spec.narrow.neurons}
    for part, share in asked.items():
        if share is not None and share < 1 and part in whole:
            raise IncompatibleError(
                f"the {part} of this {model.family.model_type} model cannot be removed",
                reasons=[whole[part]],
                next_step={
                    "heads": "leave --narrow-heads out",
                    "neurons": "leave --narrow-neurons out",
                }[part],
            )
    if spec.narrow.share is None:
        units = max(1, round((asked["heads"] or 1) * base.units))
        return base.narrowed(units, max(1, round((asked["neurons"] or 1) * base.neurons)))
    return _for_share(model, shapes, base, frozenset(whole), spec.narrow.share)


def _flags(spec: PackSpec) -> str:
    """The flags of narrowing that are set, for an error message, such as "--narrow-heads and --narrow-neurons"."""
    given = {
        "--narrow": spec.narrow.share,
        "--narrow-heads": spec.narrow.heads,
        "--narrow-neurons": spec.narrow.neurons,
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
        return multiply_adds(model.family, narrowed_shapes(model.family, shapes, base, narrower))

    budget = share * cost(base.units, base.neurons)
    found: list[tuple[tuple[bool, float], Widths]] = []
    for units in [base.units] if "heads" in whole else range(1, base.units + 1):
        least = base.neurons if "neurons" in whole else 1
        of_one = cost(units, least) - cost(units, least - 1)
        neurons = min(base.neurons, least + math.floor((budget - cost(units, least)) / of_one)) if of_one else least
        if neurons >= least:
            unused = budget - cost(units, neurons) >= of_one
            uneven = abs(units / base.units - neurons / base.neurons)
            found.append(((unused, uneven), base.narrowed(units, neurons)))
    if not found:
        least = cost(base.units if "heads" in whole else 1, base.neurons if "neurons" in whole else 1)
        raise UsageError(
            f"--narrow {share:g} is less than a block can be narrowed to",
            reasons=[
                f"with one neuron and one key-value head it still has {least / cost(base.units, base.neurons):.2f}",
                *(f"{part} stay: {why}" for part, why in obstacles(model.family, model.config, shapes).items()),
            ],
            next_step="choose a larger share",
        )
    return min(found, key=lambda one: one[0])[1]
