"""The backend of CUDA devices: which modules of a model it replaces before training."""

from typing import TYPE_CHECKING

from offsite.kernels.cuda.flash_attention import use_flash_attention
from offsite.kernels.cuda.liger import use_liger
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_for_cuda(model: "PreTrainedModel") -> tuple[Piece, ...]:
    """As `offsite.kernels.prepare`."""
    return (*use_liger(model), use_flash_attention(model))
