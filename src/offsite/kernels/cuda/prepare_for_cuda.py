"""Replaces modules of a model that trains on a CUDA device by faster ones."""

from typing import TYPE_CHECKING

from offsite.kernels.cuda.flash_attention import use_flash_attention
from offsite.kernels.cuda.liger import use_liger
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_for_cuda(model: "PreTrainedModel") -> tuple[Piece, ...]:
    """Replace modules of a model on a CUDA device in place by faster ones that compute the same.

    Returns:
        The entries for the report of the kernels: for each kind of module how many were replaced, and why others were
        not.
    """
    return (*use_liger(model), use_flash_attention(model))
