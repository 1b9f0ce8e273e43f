"""The backend of CPUs: which modules of a model it replaces before training."""

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
    """Replace modules of a model on a CPU in place by faster ones that compute the same; returns the report's entries.

    Arguments as for `offsite.kernels.prepare`.
    """
    return (*fuse(model), use_tiled_attention(model), _compiled(dtype), allocator.report())


def prepare_adapters_for_cpu(model: nn.Module) -> tuple[Piece, ...]:
    """Replace adapter modules in place by faster ones that compute the same; returns the report's entries."""
    return (replace_lora_layers(model),)


def _compiled(dtype: torch.dtype) -> Piece:
    """The report's entry on the compiled kernels."""
    level, reason = compiled.level()
    if level and dtype != torch.bfloat16:
        level, reason = 0, "they compute in bf16 alone"
    return Piece("compiled kernels", int(level > 0), reason)
