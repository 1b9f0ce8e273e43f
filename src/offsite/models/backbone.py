"""Splits a causal language model into backbone (tokens to hidden states) and head (hidden states to logits)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from offsite.errors import IncompatibleError
from offsite.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Network:
    """A causal language model in two parts: `body` computes hidden states from tokens, `head` logits from these."""

    body: nn.Module
    head: nn.Linear
    cap: float | None = None  # logits are cap * tanh(logits / cap)


def split_backbone_and_head(model: "PreTrainedModel") -> Network:
    """Split a model in eval mode into body and head, after a check on a few tokens that they give the model's logits.

    Raises:
        IncompatibleError: the logits are not head(body(ids)), with the logit cap of the model's family if it has one.
    """
    body, head = model.base_model, model.get_output_embeddings()
    family = ARCHITECTURES.get(model.config.model_type)
    cap = getattr(model.config, family.logit_cap) if family and family.logit_cap else None
    ids = torch.arange(8, device=head.weight.device).remainder(head.weight.shape[0])[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        parts = capped(F.linear(hidden_states(body, ids, mask), head.weight, head.bias), cap).float()
    # Both compute the same sums in the same order, so a difference above a rounding step means another formula.
    step = torch.finfo(head.weight.dtype).eps
    if not torch.allclose(whole, parts, rtol=2 * step, atol=step * float(whole.abs().max())):
        raise IncompatibleError(
            f"models of type {model.config.model_type!r} do more to their logits than a linear head",
            reasons=[f"logits differ by up to {float((whole - parts).abs().max()):.3g}"],
            next_step="use a family whose row in offsite/models/families.py says what becomes of its logits",
        )
    return Network(body, head, cap)


def hidden_states(body: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run the backbone on ids and mask, both (B, T); return the hidden states before the head, (B, T, H)."""
    hidden: torch.Tensor = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(logits / cap) for logits of any shape (Gemma 2, arXiv 2408.00118, section 2); None: no change."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
