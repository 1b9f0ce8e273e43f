"""Writes the settings in a GGUF file's metadata to a transformers config; settings that it cannot express are errors.

transformers reads some of the keys and ignores the others without an error. With an ignored key the model can compute
something else: scaled rotary positions, logit caps, attention windows, norms with another epsilon. So every key of the
model's architecture is checked here.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and gguf-py's constants.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Groups of keys that say nothing about what the model computes.
_IDLE_GROUPS = ("general.", "tokenizer.", "split.", "quantize.", "GGUF.", "imatrix.")
_LISTS = ("attention.sliding_window_pattern", "rope.dimension_sections")
_IDLE = {"rope.scaling.finetuned", "tensor_data_layout", "decoder_start_token_id"}
# Keys -> the config's names for the same number, the first that the config has.
_SAME: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "attention.scale": ("attention_multiplier",),
}
# Keys that may have these values alone, with which the family computes anyhow.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "nextn_predict_layers": (0,),
    "expert_shared_count": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_scale": (1.0, 0.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (1,),
    "pooling_type": (0,),
}
ROTARY = ("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scale_linear", "rope.scaling.type",
           "rope.scaling.factor", "rope.scaling.attn_factor",
           "rope.scaling.original_context_length", "rope.scaling.yarn_ext_factor",
           "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")  # fmt: skip
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}  # block counts of the 27B models
_ALIBI = 8.0  # the largest bias of BLOOM and Falcon


def carry_settings(metadata: Mapping[str, Any], config: "PretrainedConfig") -> list[str]:
    """Write the settings of a GGUF file's metadata into the config that transformers made from it.

    The config is changed in place. `gguf_rotary.carry_rotary` writes the rotary settings.

    Returns:
        An error message for each key that the config cannot express.
    """
    prefix = f"{metadata['general.architecture']}."
    problems = []
    for key, value in metadata.items():
        name = key.removeprefix(prefix)
        if key.startswith(_IDLE_GROUPS) or name in _IDLE or name in ROTARY:
            continue
        problem = _carry(name, value, metadata, config) if key.startswith(prefix) else "it is not known"
        if problem:
            problems.append(f"{key} = {str(value)[:60]}: {problem}")
    _carry_conventions(metadata, config)
    return problems


def unequal_blocks(metadata: Mapping[str, Any]) -> list[str]:
    """An error message for each metadata key whose value is a list with different values for different blocks."""
    prefix = f"{metadata['general.architecture']}."
    return [
        f"{key} = {str(value)[:60]}: blocks with different values are not supported"
        for key, value in metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in _LISTS
        if isinstance(value, list) and any(one != value[0] for one in value)
    ]


def _carry(name: str, value: Any, metadata: Mapping[str, Any], config: "PretrainedConfig") -> str | None:
    """Write one setting into the config; return an error message if the config cannot express it, else None.

    `name` is the metadata key without the name of the architecture.
    """
    if isinstance(value, list) and name not in _LISTS:
        value = value[0] if value else None
    if name == "attention.head_count_kv" and config.model_type == "falcon" and value != 1:
        return "transformers reads queries, keys and values of several key heads in the wrong order"
    if name in _ONLY:
        return None if value in _ONLY[name] else f"expected {' or '.join(map(str, _ONLY[name]))}"
    if name == "attention.value_length":
        keys = metadata.get(f"{metadata['general.architecture']}.attention.key_length", value)
        return None if value == keys else f"expected that of the keys, {keys}"
    if name == "attention.max_alibi_bias":
        alibi = config.model_type == "bloom" or getattr(config, "alibi", False)
        return None if value == (_ALIBI if alibi else 0.0) else "its blocks have no such biases"
    if name == "attention.sliding_window_pattern":
        return _carry_pattern(value, config)
    return _set(name, value, config)


def _set(name: str, value: Any, config: "PretrainedConfig") -> str | None:
    """Set the config key that corresponds to a metadata key; return an error message if there is none, else None.

    `name` is the metadata key without the name of the architecture.
    """
    known = config.to_dict()
    keys = [key for key in _SAME.get(name, ()) if key in known or key in config.attribute_map]
    if not keys:
        if name == "context_length" or value == _implied(name, config):
            return None
        return f"models of type {config.model_type} have no such setting" if name in _SAME else "it is not known"
    setattr(config, keys[0], value)
    return None


def _implied(name: str, config: "PretrainedConfig") -> Any:
    """The value of a metadata key that a model implies if its config has no such key; None if nothing is implied.

    `name` is the metadata key without the name of the architecture.
    """
    implied = {
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.sliding_window": 0,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": config.hidden_size // config.num_attention_heads,
        "feed_forward_length": 4 * config.hidden_size,
    }
    return implied.get(name)


def _carry_pattern(value: Any, config: "PretrainedConfig") -> str | None:
    """Set which blocks have sliding windows; return an error message if the config has no such setting, else None.

    `value` has a boolean for each block, or is a number n: every n-th block has full attention.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return f"models of type {config.model_type} have no such setting"
    windows = value if isinstance(value, list) else [bool((i + 1) % int(value)) for i in range(len(kinds))]
    if len(windows) != len(kinds):
        return f"expected one entry for each of the {len(kinds)} blocks"
    config.layer_types = ["sliding_attention" if window else "full_attention" for window in windows]
    return None


def _carry_conventions(metadata: Mapping[str, Any], config: "PretrainedConfig") -> None:
    """Set config values that llama.cpp has in its code for an architecture, and not in a metadata key."""
    architecture = str(metadata["general.architecture"])
    if architecture in _LARGEST_GEMMAS:
        largest = config.num_hidden_layers == _LARGEST_GEMMAS[architecture]
        per_head = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = per_head if largest else config.head_dim
    if config.model_type == "gpt2" and config.n_inner == 4 * config.n_embd:
        config.n_inner = None  # as published
