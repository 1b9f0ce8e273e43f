"""Frozen matrices held in bf16 and computed in fp32: half of their memory, for a cast each time that a block runs.

A bundle in bf16 loses nothing by it: every number is the same in fp32, and so is what comes out, bit for bit.
"""

import contextlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from offsite.kernels.activation_checkpointing import Wrapped
from offsite.kernels.runtime import let_go, mapped_files
from offsite.models.empty_weights import without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Kept = torch.Tensor | tuple[torch.Tensor, Any, Any, Any]  # or a narrow matrix and size, stride and offset of a view


class Narrow(Wrapped):
    """A block whose frozen matrices are in fp32 while it runs; for its backward pass each is cast again."""

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        """As the block's."""
        narrow = {name: matrix for name, matrix in self.block.named_parameters() if matrix.dtype == torch.bfloat16}
        wide = {name: matrix.float() for name, matrix in narrow.items()}
        narrow_of = {matrix.data_ptr(): narrow[name] for name, matrix in wide.items()}

        def pack(kept: torch.Tensor) -> _Kept:
            matrix = narrow_of.get(kept.untyped_storage().data_ptr())
            return kept if matrix is None else (matrix, kept.size(), kept.stride(), kept.storage_offset())

        with contextlib.nullcontext() if self.recomputed else saved_tensors_hooks(pack, _unpack):
            return functional_call(self.block, wide, arguments, settings)


def hold_narrow(model: "PreTrainedModel", blocks: nn.Module, trained: Collection[int]) -> None:
    """Widen a bf16 model to fp32, but for the matrices of its frozen blocks.

    Args:
        model: as it was loaded; nothing is attached yet.
        blocks: the list of its blocks.
        trained: numbers of those that will train.
    """
    frozen = [(name, block) for name, block in blocks.named_children() if int(name) not in trained]
    narrow = {id(matrix) for _, block in frozen for matrix in block.parameters() if matrix.dim() > 1}
    computed, mapped = _computed_in_fp32(model), mapped_files()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        loaded = tensor.data
        if id(tensor) in narrow:
            tensor.data = loaded.clone()  # one that is left in the mapped file would hold all of its pages
        elif tensor.is_floating_point():
            tensor.data = computed.get(name, loaded).to(tensor.device, torch.float32)
        let_go(loaded, mapped)
    for name, block in frozen:
        blocks.register_module(name, Narrow(block))


def hold_bases_narrow(blocks: nn.Module, trained: Collection[int]) -> None:
    """Narrow what stays frozen in trained blocks as well, behind `hold_narrow` and once all that trains was attached.

    Nothing is rounded: these matrices were bf16 before.
    """
    for index in map(str, trained):
        block = blocks.get_submodule(index)
        frozen = [matrix for matrix in block.parameters() if matrix.dim() > 1 and not matrix.requires_grad]
        for matrix in frozen:
            matrix.data = matrix.data.to(torch.bfloat16)
        if frozen:
            blocks.register_module(index, Narrow(block))


def _computed_in_fp32(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """What the model computes from its config and was rounded as it loaded, such as the scale of Gemma's embeddings."""
    loaded = model.state_dict()
    rounded = {name for name, one in model.named_buffers() if name not in loaded and one.dtype == torch.bfloat16}
    if not rounded:
        return {}
    with without_weights():
        anew = type(model)(model.config)
    return {name: one for name, one in anew.named_buffers() if name in rounded}


def _unpack(kept: _Kept) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    narrow, size, stride, offset = kept
    return narrow.float().as_strided(size, stride, offset)
