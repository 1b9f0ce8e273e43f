"""The list of blocks of a model, and the one way to replace a block."""

from typing import Any

from torch import nn


class Wrapped(nn.Module):
    """A block in the place of which another module runs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        """What the model around asks its blocks for, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def unwrapped_block(block: nn.Module) -> nn.Module:
    """The block itself, out of everything that it is wrapped in."""
    while isinstance(block, Wrapped):
        block = block.block
    return block
