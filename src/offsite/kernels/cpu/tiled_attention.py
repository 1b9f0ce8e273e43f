"""Attention that is fast to train on a CPU, and of long rows keeps nothing that grows with the square of T.

With AMX it is a compiled kernel (`compiled_kernels.py`). Without, or under a mask, it is made of torch's products:
torch's fused attention on CPUs is slow backwards in bf16, for short rows and pictures most of all, and has no
dropout: with it, every probability goes through fp32 in memory and is kept. Here queries run a tile at a time, up to
the last key that they may see, and without the causal rule all at once for a few heads; probabilities stay in the CPU's
cache and are computed again in the backward pass (Dao et al., arXiv 2205.14135, section 3). Under the causal rule
and without dropout torch's forward pass is the faster one, and is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from offsite.kernels.attention_interface import causal_rule_suffices, is_padded_at_right, use_attention
from offsite.kernels.cpu import compiled_kernels as kernels
from offsite.kernels.cpu.thread_dropout import LEVELS, draw_keep_mask, drawn_seed, mask_, masked
from offsite.kernels.replacement_report import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST = 448  # tokens of a row under a mask; of longer ones the fused one is as fast
TILE = 128  # queries of each head that run at once; of longer rows nothing that grows with T * T is kept
_TILES = 4  # into which longer rows are cut: each has products of its own shapes, which oneDNN compiles and keeps
PROBABILITIES_AT_ONCE = 2**20  # of them at once: 2 MiB in bf16, 4 in fp32
_EVEN = 16  # rows of probabilities are as many numbers long: products and softmaxes of odd ones take half as long again

# some rows, a tile of their queries, the keys that it sees, its probabilities, and which of them dropout keeps
_Piece = tuple[slice, slice, slice, torch.Tensor, torch.Tensor | None]


def use_tiled_attention(model: "PreTrainedModel") -> Piece:
    """Let a model on a CPU train with the attention of this file."""
    tiles = kernels.level()[0] >= kernels.TILES and model.dtype == torch.bfloat16
    reason = "a compiled kernel for matrix tiles" if tiles else "torch's products, in tiles that stay in the cache"
    return use_attention(model, "offsite_tiled", _attend, _mask, reason)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *positional: Any,
    attention_mask: torch.Tensor | None = None,  # (B, T), 1 where a token is
    **named: Any,
) -> torch.Tensor | None:
    """None where the causal rule says it all, as it does for rows padded at the right; else what SDPA would get."""
    from transformers.masking_utils import sdpa_mask

    if not positional and causal_rule_suffices(q_length, kv_length, **named) and is_padded_at_right(attention_mask):
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, *positional, attention_mask=attention_mask, **named
    )
    return mask


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # (B, heads, T, D)
    key: torch.Tensor,  # (B, key-value heads, S, D)
    value: torch.Tensor,  # (B, key-value heads, S, D)
    attention_mask: torch.Tensor | None,  # (B or 1, 1 or heads, T, S), bool, or to be added
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    trains = torch.is_grad_enabled() and query.requires_grad
    ours = (
        (trains or dropout)  # torch's dropout is slow, and draws for all threads
        and key.shape[2] == length
        and (causal or dropout or query.dtype == torch.bfloat16)  # of pictures in fp32 torch's is the faster
        and all(kwargs.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux"))
    )
    if ours and attention_mask is None and kernels.attends(query, key, value) and value.shape == key.shape:
        settings = kernels.AttentionSettings(scale, causal, round(dropout * LEVELS), drawn_seed() if dropout else 0)
        compiled: torch.Tensor = _Compiled.apply(query, key, value, settings)  # type: ignore[no-untyped-call]
        return compiled, None
    if ours and attention_mask is None and length > TILE and value.shape[3] == query.shape[3]:
        return tiled_attention(query, key, value, scale, dropout, causal=causal), None
    if ours and (dropout or length <= _LONGEST):
        return attention_at_once(query, key, value, attention_mask, scale, dropout, causal=causal), None
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return attended


def attention_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Plain products, (B, T, heads, D): of few probabilities, making them again costs more than keeping them."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    # heads that use one a key-value head are rows of one product: nothing is repeated
    rows = (query * scale).reshape(batch, groups, heads // groups * length, width)
    scores = rows @ key.transpose(2, 3)  # (B, G, heads/G * T, T)
    if mask is not None or causal:
        scores.view(batch, heads, length, length).add_(_additive(mask, scores))
    probabilities = F.softmax(scores, dim=-1)  # computed in fp32, stored in the dtype of the scores
    if dropout:
        probabilities = F.dropout(probabilities, dropout, training=True)
    output = (probabilities @ value).view(batch, heads, length, value.shape[3])
    return output.transpose(1, 2).contiguous()


def _additive(mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """The mask as what is added to the scores; None is the causal one."""
    length = scores.shape[-1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(scores.dtype).min
    return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~mask, lowest)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: kernels.AttentionSettings
    ) -> torch.Tensor:
        output, logarithms = kernels.attend(query, key, value, settings)
        ctx.save_for_backward(query, key, value, output, logarithms)
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *attended, output, logarithms = ctx.saved_tensors
        return *kernels.attend_back(gradients[0], tuple(attended), output, logarithms, ctx.settings), None


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """Attention in which every probability is computed twice and never kept.

    Args:
        query: (B, heads, T, D).
        key: (B, key-value heads, T, D), of which each serves as many heads.
        value: as `key`.
        scale: of the scores.
        dropout: probability, to a 65,536th, that an attention probability is zero.
        causal: whether a query sees no key after its own.

    Returns:
        (B, T, heads, D).
    """
    seed = drawn_seed() if dropout else None
    attended: torch.Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
        query, key, value, scale, _Kind(round(dropout * LEVELS), seed, causal)
    )
    return attended


@dataclass(frozen=True)
class _Kind:
    """What else decides the probabilities: how many of 65,536 are dropped, under which seed, and what queries see."""

    dropped: int
    seed: int | None
    causal: bool


class _Tiled(torch.autograd.Function):
    """Heads that use the same keys are rows of one product: nothing is repeated."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        kind: _Kind,
    ) -> torch.Tensor:
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        each = heads // groups
        queries = (query * scale).view(batch, groups, each, length, width).transpose(2, 3)
        queries = queries.reshape(batch * groups, length * each, width)  # (B G, T R, D)
        keys, values = (_together(kept, kind) for kept in (key, value))
        ctx.save_for_backward(queries, keys, values)
        ctx.of = scale, kind, (batch, groups, each, length, width)
        if kind.causal and not kind.dropped:
            fused = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=each > 1)
            return fused.transpose(1, 2).contiguous()
        output = torch.empty_like(queries)
        for rows, tile, seen, probabilities, keep_mask in _pieces(queries, keys, each, kind):
            output[rows, tile] = (probabilities if keep_mask is None else mask_(probabilities, keep_mask)) @ values[
                rows, seen
            ]
        if kind.dropped:
            output.mul_(LEVELS / (LEVELS - kind.dropped))
        together = output.view(batch, groups, length, each, width).transpose(1, 2)
        return together.reshape(batch, length, heads, width)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        scale, kind, (batch, groups, each, length, width) = ctx.of
        grad_output = gradients[0].reshape(batch, length, groups, each, width).transpose(1, 2)
        grad_output = grad_output.reshape(queries.shape)  # (B G, T R, D)
        if kind.dropped:
            grad_output = grad_output * (LEVELS / (LEVELS - kind.dropped))
        of_queries = torch.empty_like(queries)
        once = _tile(length, kind) == length
        of_keys, of_values = (
            torch.empty_like(keys) if once else torch.zeros_like(keys, dtype=torch.float32)  # a sum over tiles
            for _ in range(2)
        )
        put = torch.Tensor.copy_ if once else torch.Tensor.add_
        for rows, tile, seen, probabilities, keep_mask in _pieces(queries, keys, each, kind):
            come = grad_output[rows, tile]
            of_seen = (probabilities if keep_mask is None else masked(probabilities, keep_mask)).transpose(1, 2) @ come
            put(of_values[rows, seen], of_seen)
            of_probabilities = come @ values[rows, seen].transpose(1, 2)
            if keep_mask is not None:
                mask_(of_probabilities, keep_mask)
            of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
            of_queries[rows, tile] = of_scores @ keys[rows, seen]
            of_seen = of_scores.transpose(1, 2) @ queries[rows, tile]
            put(of_keys[rows, seen], of_seen)
        of_query = of_queries.mul_(scale).view(batch, groups, length, each, width).transpose(2, 3)
        of_pairs = (
            part.to(keys.dtype).view(batch, groups, -1, width)[:, :, :length] for part in (of_keys, of_values)
        )  # queries were scaled when they met the keys
        return of_query.reshape(batch, groups * each, length, width), *of_pairs, None, None


def _together(kept: torch.Tensor, kind: _Kind) -> torch.Tensor:
    """(B, G, T, D) -> (B G, T, D); causally with zeros behind T, which no query sees, to an even length."""
    batch, groups, length, width = kept.shape
    if not kind.causal:
        return kept.reshape(batch * groups, length, width)
    longer = kept.new_zeros(batch, groups, _even(length), width)
    longer[:, :, :length] = kept
    return longer.flatten(0, 1)


def _even(length: int) -> int:
    return -(-length // _EVEN) * _EVEN


def _tile(length: int, kind: _Kind) -> int:
    """Queries that run at once: all of them where none of their probabilities would be in vain and one row's are few.

    Of longer rows as many as leave few tiles, while the probabilities of a head's tile fit the cache.
    """
    if not kind.causal and length**2 <= PROBABILITIES_AT_ONCE:
        return length
    cut = -(-length // (_TILES * TILE)) * TILE  # a multiple of the tile, so at most as many as said
    return min(length, max(TILE, min(cut, PROBABILITIES_AT_ONCE // length)))


def _pieces(
    queries: torch.Tensor,  # (B G, T R, D), scaled
    keys: torch.Tensor,  # (B G, T or an even length, D)
    each: int,  # R
    kind: _Kind,
) -> Iterator[_Piece]:
    """Every piece of the attention; the same arguments give the same, dropout included."""
    length = queries.shape[1] // each
    generator = None if kind.seed is None else torch.Generator().manual_seed(kind.seed)
    tile = _tile(length, kind)
    lowest = torch.finfo(queries.dtype).min
    future = queries.new_full((tile, tile + _EVEN), lowest).triu_(1).repeat_interleave(each, 0)
    for begin in range(0, length, tile):
        end = min(length, begin + tile)
        here, seen = slice(begin * each, end * each), _even(end) if kind.causal else length
        many = max(1, PROBABILITIES_AT_ONCE // ((end - begin) * each * seen))
        for first in range(0, len(queries), many):
            rows = slice(first, first + many)
            scores = queries[rows, here] @ keys[rows, :seen].transpose(1, 2)  # (P, tile R, seen)
            if kind.causal:
                scores[..., begin:] += future[: (end - begin) * each, : seen - begin]
            probabilities = scores.softmax(-1)  # computed in fp32, stored in bf16
            keep_mask = None if generator is None else draw_keep_mask(probabilities, kind.dropped, generator)
            yield rows, here, slice(seen), probabilities, keep_mask
