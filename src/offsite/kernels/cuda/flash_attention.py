"""torch's flash attention kernels for training, without a dense mask, which would disable them.

A model that runs with this takes batches that are padded at the right alone, as the collation of rows makes them.
Whether they are is not looked at: the host would wait for the device in every pass.
"""

from typing import TYPE_CHECKING, Any

import torch

from offsite.kernels.attention_interface import causal_rule_suffices, use_attention
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_flash_attention(model: "PreTrainedModel") -> Piece:
    """Let a model run SDPA by the causal rule alone where rows are padded at the right."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    reason = "SDPA by the causal rule, without a dense mask: its flash kernels"
    name = "offsite_causal"  # with "flash" in it, transformers would look for a library of that name
    return use_attention(model, name, sdpa_attention_forward, mask_of_right_padded_rows, reason)


def mask_of_right_padded_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *positional: Any,
    attention_mask: torch.Tensor | None = None,  # (B, T), 1 where a token is
    **named: Any,
) -> torch.Tensor | None:
    """None where the causal rule suffices, without a look at the rows' padding; else the mask that SDPA would get."""
    from transformers.masking_utils import sdpa_mask

    if not positional and causal_rule_suffices(q_length, kv_length, **named):
        return None
    never_skip = {"allow_is_causal_skip": False}  # to know whether it may, it would look at the rows
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, *positional, attention_mask=attention_mask, **named | never_skip
    )
    return mask
