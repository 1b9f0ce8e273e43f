"""Trains with torch's flash attention kernels, by leaving out the dense mask that would disable them.

A model with this attention accepts only batches whose sequences are padded at the right, as `collate` makes them. This
is not checked, since in every pass the CPU would have to wait for the device.
"""

from typing import TYPE_CHECKING, Any

import torch

from offsite.kernels.attention_interface import causal_rule_suffices, use_attention
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_flash_attention(model: "PreTrainedModel") -> Piece:
    """Make a model run torch's SDPA with the causal rule and no dense mask, so that torch can use its flash kernels.

    All batches of the model must then be padded at the right.

    Returns:
        The entry for the report of the kernels.
    """
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
    """The mask for SDPA: None if the causal rule suffices, without a check of the padding; otherwise the usual mask.

    Arguments as transformers passes them to a mask function.
    """
    from transformers.masking_utils import sdpa_mask

    if not positional and causal_rule_suffices(q_length, kv_length, **named):
        return None
    never_skip = {"allow_is_causal_skip": False}  # to decide whether to skip, it would read the mask on the device
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, *positional, attention_mask=attention_mask, **named | never_skip
    )
    return mask
