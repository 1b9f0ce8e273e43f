"""Registers the attention of a backend through transformers' own attention interface; no library code is patched."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from offsite.kernels.replacement_report import ATTENTION, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_attention(
    model: "PreTrainedModel", name: str, attend: Callable[..., Any], mask: Callable[..., Any], reason: str
) -> Piece:
    """Replace a model's attention by another function, if it is torch's SDPA (scaled dot-product attention).

    Args:
        model: the model, changed in place; its config gets the name of the attention.
        name: the name under which the function is registered in transformers.
        attend: the attention function, with the arguments that transformers passes to an attention function.
        mask: the function that makes the mask for it, with the arguments that transformers passes to a mask function.
        reason: why this attention is used, for the report of the kernels.

    Returns:
        The entry for the report of the kernels: the number of blocks; or 0 and the reason, if nothing was replaced.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return Piece(ATTENTION, 0, f"the model runs {implementation} attention, not SDPA")
    if not getattr(model, "_supports_attention_backend", False):
        # Falcon, for example, would run another attention with the mask that is made for this one
        return Piece(ATTENTION, 0, "the model's own code chooses its attention by name")
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    return Piece(ATTENTION, getattr(model.config.get_text_config(), "num_hidden_layers", 1), reason)


def causal_rule_suffices(q_length: int, kv_length: int, **named: Any) -> bool:
    """Whether the causal rule alone gives the right mask, for sequences that are padded at the right.

    All padding comes after the tokens, so under the causal rule no token attends to padding. Outputs at padded
    positions are wrong, but nothing reads them.

    Args:
        q_length: the number of queries of a sequence.
        kv_length: the number of keys of a sequence.
        **named: the other arguments that transformers passes to its mask functions.
    """
    from transformers.masking_utils import causal_mask_function

    causal = named.get("mask_function", causal_mask_function) is causal_mask_function
    if named.get("allow_is_causal_skip") is True and q_length <= (named.get("local_size") or 0):
        causal = True  # the window (or chunk) is at least as long as the sequences
    whole = q_length == kv_length and not named.get("q_offset") and not named.get("kv_offset")
    return causal and whole and bool(named.get("allow_is_causal_skip", True))


def is_padded_at_right(attention_mask: torch.Tensor | None) -> bool:
    """Whether every sequence of an attention mask (B, T), 1 at tokens and 0 at padding, has its padding at the right.

    None means no padding. For a mask on an accelerator the CPU has to wait for the result.
    """
    return attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
