"""Attention that is fast to train on a processor: plain matrix products where sequences are short.

torch's fused attention on processors is slow backwards in bf16: at 200 tokens, 9 heads and 3 key-value heads, forward
and backward take 32 ms there and 12 ms here (one core with AMX, 1,600 tokens). It wins from about 500 tokens on, and
whenever no gradient is wanted; then it runs. Registered through transformers' own interface, nothing is patched.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "offsite_short"
_LONGEST = 448  # tokens; above, the fused one is as fast and needs less memory


def use_short_attention(model: "PreTrainedModel") -> None:
    """Let a bf16 model on a processor train with the attention of this file; others stay as they are."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation != "sdpa" or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return
    if not getattr(model, "_supports_attention_backend", False):
        return  # its own code branches on the name: Falcon would take another attention under this one's mask
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # (B, heads, T, D)
    key: torch.Tensor,  # (B, key-value heads, S, D)
    value: torch.Tensor,  # (B, key-value heads, S, D)
    attention_mask: torch.Tensor | None,  # (B, 1, T, S), bool, or to be added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    ours = (
        torch.is_grad_enabled()
        and query.requires_grad
        and key.shape[2] == length <= _LONGEST
        and (causal if attention_mask is None else attention_mask.shape[1] == 1)
        and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux"))
    )
    if not ours:
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return attended
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    # heads that share a key-value head are rows of one product: nothing is repeated
    rows = (query * scale).reshape(batch, groups, heads // groups * length, width)
    scores = rows @ key.transpose(2, 3)  # (B, G, heads/G * T, T)
    scores.view(batch, heads, length, length).add_(_additive(attention_mask, scores))
    shares = F.softmax(scores, dim=-1)  # computed in fp32, stored in bf16
    if dropout:
        shares = F.dropout(shares, dropout, training=True)
    output = (shares @ value).view(batch, heads, length, width)
    return output.transpose(1, 2).contiguous(), None


def _additive(mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """The mask as what is added to the scores; None is the causal one."""
    length = scores.shape[-1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(scores.dtype).min
    return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~mask, lowest)
