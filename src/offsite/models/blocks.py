"""The base class of modules that replace a transformer block of a model."""

from typing import Any

from torch import nn


class Wrapped(nn.Module):
    """Base class of modules that run in place of a transformer block; the original is its submodule `block`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        """Look up a missing attribute in the block, since models read attributes of blocks, such as attention types."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def unwrapped_block(block: nn.Module) -> nn.Module:
    """The original transformer block, without any `Wrapped` modules around it."""
    while isinstance(block, Wrapped):
        block = block.block
    return block
