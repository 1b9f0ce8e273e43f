"""Shares the frozen weights of a model's blocks among the processes of a run, by torch's FSDP2 (arXiv 2304.11277).

Each process keeps a share of every block's frozen weights. When a block runs, forward or backward, it is gathered from
all processes, and freed again afterwards. So all processes must run their blocks equally often ("in lockstep").
Trained weights stay whole in every process.
"""

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from offsite.errors import IncompatibleError, UsageError


def shard_blocks(model: nn.Module, blocks: nn.Module, trained: Iterable[nn.Parameter], device: torch.device) -> int:
    """Share the frozen weights of blocks among all processes, in place, and move all other weights to the device.

    Args:
        model: a model on the CPU, the same in every process, with adapters attached.
        blocks: the list of its blocks.
        trained: the parameters that train; they are not shared.
        device: the device of this process.

    Returns:
        The number of blocks whose weights are shared.

    Raises:
        UsageError: the installed torch cannot leave parameters out of what is shared.
        IncompatibleError: several blocks have the same weights, so none of them can be freed after it has run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UsageError(
            "--shard blocks needs torch 2.7 or newer",
            reasons=[f"found: torch {torch.__version__}"],
            next_step="install a newer torch, or leave --shard out",
        )
    trained = set(trained)
    owners: dict[nn.Parameter, nn.Module] = {}
    for block in blocks.children():
        for parameter in block.parameters():
            if owners.setdefault(parameter, block) is not block:
                raise IncompatibleError(
                    "blocks of this bundle share weights, so the weights cannot be shared among processes",
                    next_step="leave out --shard; a bundle with shared blocks is small",
                )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    count = 0
    for block in blocks.children():
        own = set(block.parameters())
        whole = {parameter for parameter in own if parameter in trained or not parameter.is_floating_point()}
        if own - whole:
            fully_shard(block, mesh=mesh, ignored_params=whole)
            count += 1
    for tensor in _whole_tensors(model):
        tensor.data = tensor.data.to(device)
    return count


def _whole_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers that are not shared."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not hasattr(tensor, "device_mesh"):
            yield tensor
