"""The tensors of declared module kinds: names and shapes, as both parties derive them. Torch-free."""

import re
from collections.abc import Iterable, Mapping

from offsite.models.architectures import Architecture

_BOTTLENECK = re.compile(r"(.+)\.bottleneck\.(?:down|up)\.(?:weight|bias)")


def bottleneck_places(family: Architecture, blocks: Iterable[int]) -> list[str]:
    """The modules behind which a bottleneck stands: what ends attention and MLP (all of a mixture), by full path."""
    return [family.in_block(index, path) for index in blocks for path in (family.attention_out, family.mlp_out)]


def bottleneck_shapes(place: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the bottleneck after a linear layer.

    Args:
        place: full path of the linear layer.
        hidden: its outputs.
        width: of the bottleneck.
    """
    return {
        f"{place}.bottleneck.down.weight": (width, hidden),
        f"{place}.bottleneck.down.bias": (width,),
        f"{place}.bottleneck.up.weight": (hidden, width),
        f"{place}.bottleneck.up.bias": (hidden,),
    }


def place_of_bottleneck(name: str) -> str | None:
    """The linear layer that a bottleneck's tensor stands behind; None for a tensor of anything else."""
    match = _BOTTLENECK.fullmatch(name)
    return match[1] if match else None


def widths_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The width of each bottleneck, by its position, from the shapes of its biases."""
    ends = ".bottleneck.down.bias"
    return {name.removesuffix(ends): shape[0] for name, shape in shapes.items() if name.endswith(ends) and shape}
