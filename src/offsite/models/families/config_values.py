"""The values that the config keys of a bundle may have. Torch-free.

A config comes from the other party. Tensors confirm some of its numbers; every other number has a limit here, so that a
small file cannot ask for much memory or time, and a value of another kind (true in place of a number) is refused before
a library acts on it. null is permitted everywhere: it stands for the default of transformers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from offsite.models.families.family import Architecture

_Check = Callable[[object], bool]
LARGEST = 2**22  # most positions of a model: a few classes compute a table of that length
_LARGEST_SIZE = 2**24  # most features, tokens or neurons; tensors confirm them
_LARGEST_NUMBER = 1e12  # of a base of rotary positions, or a scale


def _whole(low: int, high: int) -> _Check:
    """A check that a value is an integer from `low` to `high`, and no boolean."""
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float, *, above: bool = False, below: bool = False) -> _Check:
    """A check that a value is a finite number from `low` to `high`; `above` and `below` exclude the limits."""

    def check(value: object) -> bool:
        if type(value) not in (int, float) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    return check


def _token_id(value: object) -> bool:
    """Whether a value is a token id or a list of token ids; -1 means that there is no such token."""
    ids = value if isinstance(value, list) else [value]
    return 1 <= len(ids) <= 64 and all(type(one) is int and -1 <= one < 2**31 for one in ids)


def _words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _blocks(value: object) -> bool:
    """Whether a value is a list of small whole numbers: indices of blocks, or a 0 or 1 for each."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 10_000 for one in value)


_switch, _word = (lambda value: isinstance(value, bool)), (lambda value: isinstance(value, str))
_size, _count, _position = _whole(1, _LARGEST_SIZE), _whole(0, 10_000), _whole(1, LARGEST)
_share, _chance = _number(0, 1, above=True), _number(0, 1, below=True)
_positive, _scale = _number(0, _LARGEST_NUMBER, above=True), _number(-1e6, 1e6)
_dtype: _Check = lambda value: value in ("float32", "bfloat16", "float16")  # noqa: E731
_KINDS: tuple[tuple[str, _Check, str], ...] = (  # what is expected, its check, the keys
    (
        "true or false", _switch,
        ("_remove_final_layer_norm alibi apply_residual_connection_post_layernorm attention_bias bias "
        "do_layer_norm_before do_pooling enable_bias layer_norm_elementwise_affine mlp_bias multi_query "
        "new_decoder_architecture norm_topk_prob parallel_attn qk_layernorm qkv_bias reorder_and_upcast_attn "
        "scale_attn_by_inverse_layer_idx scale_attn_weights tie_word_embeddings use_absolute_position_embeddings "
        "use_cache use_mask_token use_mean_pooling use_parallel_residual use_qkv_bias use_relative_position_bias "
        "use_shared_relative_position_bias use_sliding_window use_swiglu_ffn vision_use_head"),
    ),
    (
        f"a whole number from 1 to {_LARGEST_SIZE}", _size,
        ("ffn_dim ffn_hidden_size head_dim hidden_size intermediate_size moe_intermediate_size n_embd n_embed n_inner "
        "projection_dim shared_expert_intermediate_size vocab_size word_embed_proj_dim"),
    ),
    (
        "a whole number from 0 to 10000", _count,
        ("decoder_sparse_step max_window_layers n_head n_layer no_rope_layer_interval num_attention_heads num_classes "
        "num_experts num_experts_per_tok num_hidden_layers num_key_value_heads num_kv_heads num_ln_in_parallel_attn "
        "num_local_experts num_register_tokens pretraining_tp"),
    ),
    (
        f"a whole number from 1 to {LARGEST}", _position,
        "max_position_embeddings n_ctx n_positions original_max_position_embeddings",
    ),
    # transformers writes 0 for a Qwen2-MoE without a window
    (f"a whole number from 0 to {LARGEST}", _whole(0, LARGEST), "sliding_window"),
    ("a whole number from 1 to 4096", _whole(1, 4096), "image_size num_channels patch_size rotary_dim"),
    ("token ids", _token_id, "bos_token_id eos_token_id pad_token_id"),
    (
        "a number from 0 up to 1", _chance,
        ("attention_dropout attention_probs_dropout_prob attn_pdrop drop_path_rate dropout embd_pdrop hidden_dropout "
        "hidden_dropout_prob resid_pdrop router_jitter_noise"),
    ),
    (
        "a number above 0, at most 1", _share,
        "layer_norm_eps layer_norm_epsilon partial_rotary_factor rms_norm_eps rotary_pct",
    ),
    (
        "a number above 0", _positive,
        ("attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar rope_local_base_freq rope_theta "
        "rotary_emb_base"),
    ),
    (
        "a number", _scale,
        "init_std initializer_factor initializer_range layer_scale_init_value layerscale_value mlp_ratio",
    ),
    ("a word", _word, "activation activation_function architecture hidden_act hidden_activation model_type"),
    ("float32, bfloat16 or float16", _dtype, "dtype torch_dtype"),
    ("a list of words", _words, "architectures layer_types"),
    ("a list of numbers of blocks", _blocks, "mlp_only_layers no_rope_layers"),
)  # fmt: skip
_BY_KEY: Mapping[str, tuple[str, _Check]] = {key: (text, check) for text, check, keys in _KINDS for key in keys.split()}
_ROPE = ("rope_parameters", "rope_scaling")
# Of timm's encoders, whose values follow from others: `Architecture.strays` compares them.
_COMPUTED = frozenset({"gates", "model_args", "pooled_norm", "positions", "separate", "whole_bias"})
CHECKED_KEYS = frozenset({*_BY_KEY, *_ROPE, *_COMPUTED})  # every key of a family in the table


def value_problems(config: Mapping[str, Any], family: Architecture) -> Iterator[str]:
    """Yield a message for each value of a family's config that is of another kind than its key asks for, or too large.

    Args:
        config: the family's config.
        family: its family, from the table or declared. Keys that only a declared family has are checked by their names.
    """
    for key, value in config.items():
        if value is None:
            continue
        if key in _ROPE:
            yield from _rope_problems(key, value)
            continue
        if key in _COMPUTED and not family.layouts:
            continue
        expected, check = _BY_KEY.get(key) or _by_name(key, value)
        if not check(value):
            yield f"{key} = {str(value)[:60]!r}, expected {expected}"
    for key, most in family.limits.items():
        if type(config.get(key)) is int and config[key] > most:
            yield f"{key} = {str(config[key])[:60]}, expected at most {most}"


def _by_name(key: str, value: object) -> tuple[str, _Check]:
    """What a key of a declared family may hold, by its name; the other rules for such configs apply as well."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "anything", lambda _: True
    if "drop" in key and isinstance(value, float):
        return "a number from 0 up to 1", _chance
    if key.endswith(("eps", "epsilon")):
        return "a number above 0, at most 1", _share
    if isinstance(value, int) and any(word in key for word in ("layers", "experts", "heads", "groups")):
        return "a whole number from -1 to 10000", _whole(-1, 10_000)
    return f"a number up to {_LARGEST_NUMBER:g}", _number(-_LARGEST_NUMBER, _LARGEST_NUMBER)


def _rope_problems(key: str, value: object) -> Iterator[str]:
    """Yield a message for each setting of rotary positions that is not permitted.

    The settings are one object, or an object of such objects, one for each kind of attention.
    """
    if not isinstance(value, dict):
        yield f"{key} = {str(value)[:60]!r}, expected an object"
        return
    for name, one in value.items():
        where = f"{key}.{name[:40]}"
        if isinstance(one, dict):
            if any(isinstance(inner, dict) for inner in one.values()):
                yield f"{where} is nested too deeply"
            else:
                yield from _rope_problems(where, one)
        elif one is not None and not _ROPE_VALUES.get(name, _other_rope_value)(one):
            yield f"{where} = {str(one)[:60]!r}, which is no such setting of rotary positions"


def _factors(value: object) -> bool:
    """Whether a value is a list of scales, one for each frequency."""
    return isinstance(value, list) and 1 <= len(value) <= 4096 and all(_positive(one) for one in value)


def _other_rope_value(value: object) -> bool:
    """Whether a setting of rotary positions without a row below has a plain value: a word, a switch, small numbers."""
    plain = [*value] if isinstance(value, list) else [value]
    return all(isinstance(one, str | bool) or _scale(one) for one in plain)


_ROPE_VALUES: Mapping[str, _Check] = {
    "rope_type": _word,
    "type": _word,
    "rope_theta": _positive,
    "factor": _number(0, 1e6, above=True),
    "partial_rotary_factor": _share,
    "original_max_position_embeddings": _position,
    "max_position_embeddings": _position,
    "attention_factor": _number(0, 1e6),
    "low_freq_factor": _number(0, 1e6, above=True),
    "high_freq_factor": _number(0, 1e6, above=True),
    "beta_fast": _number(0, 1e6, above=True),
    "beta_slow": _number(0, 1e6, above=True),
    "long_factor": _factors,
    "short_factor": _factors,
    "truncate": _switch,
}
