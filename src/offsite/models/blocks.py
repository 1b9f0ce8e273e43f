"""The base class of modules that replace a block of a model."""

from typing import Any

from torch import nn


class Wrapped(nn.Module):
    """Base class of a module that runs in place of a block; it keeps that block as `block`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        """Look up missing attributes in the block, since models read attributes of their blocks (kind of attention)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def unwrapped_block(block: nn.Module) -> nn.Module:
    """The original block, without any `Wrapped` modules around it."""
    while isinstance(block, Wrapped):
        block = block.block
    return block
