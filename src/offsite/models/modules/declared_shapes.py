"""Computes the names and shapes of the tensors of bottlenecks, for both parties. Torch-free."""

import re
from collections.abc import Iterable, Mapping

from offsite.models.families.architectures import Architecture

_BOTTLENECK = re.compile(r"(.+)\.bottleneck\.(?:down|up)\.(?:weight|bias)")


def bottleneck_places(family: Architecture, blocks: Iterable[int]) -> list[str]:
    """The full paths of the modules after which bottlenecks are inserted, in the blocks with these indices.

    They are the last linear layer of attention, and that of the MLP or the whole mixture of experts.
    """
    return [family.in_block(index, path) for index in blocks for path in family.outputs_of(index)]


def bottleneck_shapes(place: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of the bottleneck after a linear layer, by full name.

    Args:
        place: the full path of the linear layer.
        hidden: the number of outputs of that layer.
        width: the width of the bottleneck.
    """
    return {
        f"{place}.bottleneck.down.weight": (width, hidden),
        f"{place}.bottleneck.down.bias": (width,),
        f"{place}.bottleneck.up.weight": (hidden, width),
        f"{place}.bottleneck.up.bias": (hidden,),
    }


def place_of_bottleneck(name: str) -> str | None:
    """The full path of the linear layer before a bottleneck, from the name of one of the bottleneck's tensors.

    None for tensors of other modules.
    """
    match = _BOTTLENECK.fullmatch(name)
    return match[1] if match else None


def widths_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The width of each bottleneck, by the full path of the linear layer before it.

    Args:
        shapes: the shapes of the bottlenecks' tensors, by full name.
    """
    ends = ".bottleneck.down.bias"
    return {name.removesuffix(ends): shape[0] for name, shape in shapes.items() if name.endswith(ends) and shape}
