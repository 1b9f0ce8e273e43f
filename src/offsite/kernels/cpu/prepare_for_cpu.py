"""Replaces modules of a model that trains on a CPU by faster ones."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from offsite.kernels.cpu import allocator
from offsite.kernels.cpu import compiled_kernels as compiled
from offsite.kernels.cpu.fused_modules import fuse
from offsite.kernels.cpu.lora_linear import replace_lora_layers
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_for_cpu(model: "PreTrainedModel", dtype: torch.dtype) -> tuple[Piece, ...]:
    """Replace modules of a model on a CPU in place by faster ones that compute the same.

    Arguments as for `offsite.kernels.prepare`.

    Returns:
        The entries for the report of the kernels: for each kind of module how many were replaced, and why others were
        not.
    """
    return (*fuse(model), use_tiled_attention(model), _compiled(dtype), allocator.report())


def prepare_adapters_for_cpu(model: nn.Module) -> tuple[Piece, ...]:
    """Replace adapter modules in place by faster ones that compute the same.

    Returns:
        The entries for the report of the kernels: how many modules were replaced, and why others were not.
    """
    return (replace_lora_layers(model),)


def _compiled(dtype: torch.dtype) -> Piece:
    """The entry for the report of the kernels: whether the compiled kernels are used, and the reason."""
    level, reason = compiled.level()
    if level and dtype != torch.bfloat16:
        level, reason = 0, "they compute in bf16 alone"
    return Piece("compiled kernels", int(level > 0), reason)
