"""Measures how a block's output responds to a change in the output of one of its layers, by running the block.

It is used for model families without a row in the architecture table, where it is unknown what follows the MLP's last
layer. If only additions and scales follow, the response is a factor per token times a factor per channel. If norms
follow, it is the response of the norms with fixed statistics. Both are checked; if neither is true, refit uses the
gradient instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.heal.held_norm import HeldNorm, hold_norm

_STEP = 0.1  # size of a change, relative to what is changed
_TOLERANCE = 0.1  # of the response's norm, in the median over tokens


@dataclass(frozen=True)
class Response:
    """The response of a block's output to a change of a layer's output, for one batch of N tokens.

    If `norms` is empty, the block's output changes by factor * scale times the change.
    """

    known: bool  # whether the measured block responds as the other fields say; if not, ignore them
    norms: tuple[str, ...] = ()  # paths in the module of the norms that the layer's output goes through, in order
    factor: Tensor | None = None  # (N, 1)
    scale: Tensor | None = None  # (H,)


def measure_response(block: LoadedBlock, path: str, ids: Tensor, enters: Tensor) -> Response:
    """Measure the response of a block's output to a change in the output of one of its linear layers.

    Args:
        block: the loaded block.
        path: the layer's path in the block's torch module.
        ids: token ids (B, T) of one batch, or pixels.
        enters: the block's inputs for this batch, (B, T, H).
    """
    norms = _norms(block.module)
    outputs: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        outputs.append(output)
        return output

    with captured_inputs(block, norms) as before, _changed(block, path, keep):
        after = block(ids, enters).flatten(0, -2)  # (N, H)
    given = outputs[-1].flatten(0, -2).float()  # (N, H)
    size = _STEP * float(given.square().mean().sqrt()) or _STEP
    change = size * torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given.device)
    with captured_inputs(block, norms) as moved:
        risen = _risen(block, path, ids, enters, change)
    passed = tuple(name for name in before if name in moved and not torch.equal(before[name], moved[name]))
    if passed:
        held = [hold_norm(block.module.get_submodule(name), before[name]) for name in passed]
        return _through_norms(block, path, ids, enters, after, passed, held, change)
    rise = (_risen(block, path, ids, enters, torch.full_like(change, size)) - after) / size  # (N, H)
    scale = rise.mean(0)
    factor = rise @ scale[:, None] / scale.square().sum().clamp_min(1e-12)  # (N, 1)
    return Response(_agree(risen - after, factor * scale * change), (), factor, scale)


def _through_norms(
    block: LoadedBlock,
    path: str,
    ids: Tensor,
    enters: Tensor,
    after: Tensor,
    norms: tuple[str, ...],
    held: list[HeldNorm],
    change: Tensor,
) -> Response:
    """The response through norms, checked with a change that does not alter the first norm's statistics.

    Args:
        block: the loaded block.
        path: the layer's path in the block's torch module.
        ids: token ids or pixels of the batch.
        enters: the block's inputs, (B, T, H).
        after: the block's output without a change, (N, H).
        norms: paths in the torch module of the norms that the layer's output goes through, in order.
        held: these norms with their statistics for the batch.
        change: a random change of the layer's output, (N, H).
    """
    along = held[0].normalised
    change = change - change.mean(-1, keepdim=True)
    along = along - along.mean(-1, keepdim=True)
    change = (
        change - (change * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp_min(1e-12) * along
    )
    expected = change
    for norm in held:
        expected = expected * norm.inverse * norm.gain
    found = _risen(block, path, ids, enters, change) - after
    return Response(_agree(found, expected), norms)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two responses (N, H) are equal within the tolerance, for the median token."""
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)  # (N,)
    return float(error.median()) < _TOLERANCE


def _risen(block: LoadedBlock, path: str, ids: Tensor, enters: Tensor, change: Tensor) -> Tensor:
    """The block's output, (N, H), if `change` (N, H) is added to the output of the layer at `path`."""
    with _changed(block, path, lambda output: output + change.view(output.shape).to(output.dtype)):
        return block(ids, enters).flatten(0, -2)


@contextlib.contextmanager
def _changed(block: LoadedBlock, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager: replace the output of the layer at `path` by `change(output)` in the body."""
    handle = block.module.get_submodule(path).register_forward_hook(lambda _, __, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _norms(module: nn.Module) -> list[str]:
    """The paths of all modules in a block whose class name ends with "norm"."""
    return [name for name, one in module.named_modules() if name and type(one).__name__.lower().endswith("norm")]
