"""Gradient checkpointing (arXiv 1604.06174): a block stores only its input, and runs again in the backward pass."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from offsite.kernels.cpu.thread_dropout import OwnRandomness, own_randomness
from offsite.models.blocks import Wrapped


class Checkpointed(Wrapped):
    """A block whose activations are computed again in the backward pass, with the same random numbers (dropout).

    The gradient checkpointing of transformers itself works only on modules in training mode, which would put dropout
    into frozen blocks.
    """

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """Run the block without storing its activations; arguments and result are those of the block."""
        own = own_randomness()
        if own is None:
            return checkpoint(self.block, *arguments, use_reentrant=False, **settings)
        state = own.state

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), OwnRandomness(state)

        return checkpoint(self.block, *arguments, use_reentrant=False, context_fn=contexts, **settings)


def checkpoint_activations(blocks: nn.Module) -> None:
    """Wrap every block of a list, in place, so that its activations are computed again in the backward pass.

    Call it after all adapters have been attached to the blocks. A block that is already wrapped is not wrapped again.
    """
    for name, block in list(blocks.named_children()):
        if not isinstance(block, Checkpointed):
            blocks.register_module(name, Checkpointed(block))


def keep_activations(blocks: nn.Module) -> None:
    """Undo `checkpoint_activations`: unwrap the blocks in place, so that they store their activations again."""
    for name, block in list(blocks.named_children()):
        if isinstance(block, Checkpointed):
            blocks.register_module(name, block.block)
