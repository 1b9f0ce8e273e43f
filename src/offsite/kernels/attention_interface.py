"""Gives a model a backend's attention through transformers' own attention interface; nothing is patched."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from offsite.kernels.replacement_report import ATTENTION, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_attention(
    model: "PreTrainedModel", name: str, attend: Callable[..., Any], mask: Callable[..., Any], reason: str
) -> Piece:
    """Let a model that runs SDPA run another attention.

    Args:
        model: its config gets the attention's name.
        name: under which the attention is registered.
        attend: the attention, as transformers calls it.
        mask: makes its mask, as transformers calls it.
        reason: why it is used, for the report.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return Piece(ATTENTION, 0, f"the model runs {implementation} attention, not SDPA")
    if not getattr(model, "_supports_attention_backend", False):
        # Falcon, for one, would take another attention under this one's mask
        return Piece(ATTENTION, 0, "the model's own code chooses its attention by name")
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    return Piece(ATTENTION, getattr(model.config.get_text_config(), "num_hidden_layers", 1), reason)


def causal_rule_suffices(q_length: int, kv_length: int, **named: Any) -> bool:
    """Whether the causal rule alone gives the right mask, for rows that are padded at the right.

    What stands behind a row's last token is seen by no token of the row; what is computed there is read by nobody.

    Args:
        q_length: queries of a row.
        kv_length: its keys.
        **named: what transformers gives its mask functions besides.
    """
    from transformers.masking_utils import causal_mask_function

    causal = named.get("mask_function", causal_mask_function) is causal_mask_function
    if named.get("allow_is_causal_skip") is True and q_length <= (named.get("local_size") or 0):
        causal = True  # the window, or chunk, is no shorter than the rows
    whole = q_length == kv_length and not named.get("q_offset") and not named.get("kv_offset")
    return causal and whole and bool(named.get("allow_is_causal_skip", True))


def is_padded_at_right(attention_mask: torch.Tensor | None) -> bool:
    """Whether no row of a mask (B, T), 1 where a token is, has a token behind its padding. On a device this waits."""
    return attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
