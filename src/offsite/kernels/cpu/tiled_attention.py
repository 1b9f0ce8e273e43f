"""Attention that is fast to train on a CPU, and for long sequences stores nothing that grows with T * T.

On matrix tiles (AMX) in bf16 without a mask it runs a compiled kernel (`compiled_kernels.py`). Otherwise it consists of
torch's matrix products. torch's own fused attention on CPUs has a slow backward pass in bf16, most of all for short
sequences and for pictures, and with dropout torch stores every probability in fp32.

Here the queries run a tile at a time, up to the last key that they may see; without the causal rule all queries of a
few heads run at once. Probabilities stay in the CPU's cache and are computed again in the backward pass (Dao et al.,
arXiv 2205.14135, section 3). Under the causal rule without dropout, torch's forward pass is faster and is used.
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

_LONGEST = 448  # tokens; for longer sequences under a mask torch's fused attention is as fast
TILE = 128  # queries of a head in the smallest tile; sequences that are not longer store their probabilities
_TILES = 4  # most tiles of a sequence, if they fit the cache: oneDNN compiles and caches products for each tile's shape
PROBABILITIES_AT_ONCE = 2**20  # the most probabilities of a piece: 2 MiB in bf16, 4 MiB in fp32
_EVEN = 16  # under the causal rule a tile sees a multiple of it of keys: other lengths take half as long again

# slice of sequences and key-value heads, slice of their queries, slice of the keys that these queries see,
# probabilities, and the mask of those that dropout keeps (None without dropout)
_Piece = tuple[slice, slice, slice, torch.Tensor, torch.Tensor | None]


def use_tiled_attention(model: "PreTrainedModel") -> Piece:
    """Replace the attention of a model on a CPU by `_attend`; returns the entry for the report of the kernels."""
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
    """The mask for `_attend`: None if the causal rule suffices (sequences padded at the right), else SDPA's mask.

    Arguments as transformers passes them to a mask function; `attention_mask` None: no padding.
    """
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
    attention_mask: torch.Tensor | None,  # (B or 1, 1 or heads, T, S), boolean, or added to the scores
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that transformers calls, with its arguments; it runs the fastest function below, or torch's SDPA.

    Returns the output (B, T, heads, D); and None, since no attention probabilities are returned.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    trains = torch.is_grad_enabled() and query.requires_grad
    ours = (
        (trains or dropout)  # torch's dropout is slow, and uses one random generator for all threads
        and key.shape[2] == length
        and (causal or dropout or query.dtype == torch.bfloat16)  # for pictures in fp32 torch's attention is faster
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
    """Attention by plain products that stores its probabilities, for short sequences; (B, T, heads, D).

    If there are few probabilities, storing them costs less than computing them again. Arguments as for
    `tiled_attention`; `mask` is boolean, or is added to the scores.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    # query heads that use the same key-value head are rows of one product, so keys and values are not repeated
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
    """Convert a mask to one that is added to the scores; None means the causal mask."""
    length = scores.shape[-1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(scores.dtype).min
    return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~mask, lowest)


class _Compiled(torch.autograd.Function):
    """Autograd function of the compiled attention."""

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
    """Attention that never stores its probabilities: they are computed again in the backward pass.

    Args:
        query: (B, heads, T, D).
        key: (B, key-value heads, T, D); each key-value head serves the same number of query heads.
        value: same shape as `key`.
        scale: the factor of the scores.
        dropout: the probability that an attention probability is zero, rounded to a multiple of 1 / 65,536.
        causal: whether a query sees no later keys.

    Returns:
        The output (B, T, heads, D).
    """
    seed = drawn_seed() if dropout else None
    attended: torch.Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
        query, key, value, scale, _Kind(round(dropout * LEVELS), seed, causal)
    )
    return attended


@dataclass(frozen=True)
class _Kind:
    """Dropout and causal rule of an attention.

    Attributes:
        dropped: how many of 65,536 attention probabilities dropout sets to zero.
        seed: the seed of dropout; None without dropout.
        causal: whether a query sees no later keys.
    """

    dropped: int
    seed: int | None
    causal: bool


class _Tiled(torch.autograd.Function):
    """Autograd function of `tiled_attention`.

    Query heads that use the same key-value head are rows of one matrix product, so keys and values are never repeated.
    """

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
        )  # no scale for the keys: the queries in the product are already scaled
        return of_query.reshape(batch, groups * each, length, width), *of_pairs, None, None


def _together(kept: torch.Tensor, kind: _Kind) -> torch.Tensor:
    """Merge batch and heads of keys or values: (B, G, T, D) -> (B G, T, D).

    Under the causal rule T is padded with zeros to a multiple of 16; no query sees the padding.
    """
    batch, groups, length, width = kept.shape
    if not kind.causal:
        return kept.reshape(batch * groups, length, width)
    longer = kept.new_zeros(batch, groups, _even(length), width)
    longer[:, :, :length] = kept
    return longer.flatten(0, 1)


def _even(length: int) -> int:
    """Round a length up to a multiple of 16."""
    return -(-length // _EVEN) * _EVEN


def _tile(length: int, kind: _Kind) -> int:
    """The number of queries that run at once, of a head with `length` queries.

    All queries run at once if there is no causal rule and the probabilities of one head are few. Otherwise a head is
    cut into few tiles, whose probabilities still fit into the CPU's cache.
    """
    if not kind.causal and length**2 <= PROBABILITIES_AT_ONCE:
        return length
    cut = -(-length // (_TILES * TILE)) * TILE  # rounded up to a multiple of TILE, so at most _TILES tiles
    return min(length, max(TILE, min(cut, PROBABILITIES_AT_ONCE // length)))


def _pieces(
    queries: torch.Tensor,  # (B G, T R, D), scaled
    keys: torch.Tensor,  # (B G, T or an even length, D)
    each: int,  # R
    kind: _Kind,
) -> Iterator[_Piece]:
    """Yields the attention in pieces: each has the probabilities of one tile of queries for some of the heads.

    In the shapes, G is the number of key-value heads, and R the number of query heads for each of them. The same
    arguments give the same pieces, and the same dropout.
    """
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
