"""A tiny config of every causal model type that transformers has: the type's own defaults, made small by their names.

One generic rule shrinks a config; `SPECIAL` says what it cannot know of some types.
"""

from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

# sizes by the name of a config key; the first that matches is taken
SIZES: dict[str, int] = {
    "vocab_size": 320,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "n_embed": 32, "dim_model": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "attention_hidden_size": 32, "decoder_hidden_size": 32, "emb_dim": 32,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2,
    "head_dim": 8, "attention_head_dim": 8, "dim_head": 8, "d_kv": 8,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "dim_ff": 48, "dff": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "block_ff_dim": 48, "feed_forward_size": 48, "d_inner": 48,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48, "prefix_dense_intermediate_size": 48, "shared_expert_size": 16,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_sequence_length": 64, "max_seq_len": 64,
    "original_max_position_embeddings": 64, "sliding_window": 4, "window_size": 4, "attention_window_size": 4,
    "attention_chunk_size": 16, "local_attention": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "num_experts_per_token": 2, "top_k_experts": 2,
    "moe_num_active_primary_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "n_groups": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    "rotary_dim": 4, "state_size": 8, "conv_kernel": 4, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_d_conv": 4, "mamba_expand": 2, "expand": 2, "mamba_n_groups": 1, "mamba_chunk_size": 8, "chunk_size": 8,
    "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
    "mamba_d_ssm": 64, "mamba_dt_rank": 4, "n_mamba_heads": 2, "time_step_rank": 4, "lru_width": 32,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "kv_channels": 8, "query_pre_attn_scalar": 8, "global_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "max_window_layers": 2, "image_size": 16, "patch_size": 4, "embedding_dim": 32, "rotary_ndims": 4,
    "prompt_length": 4, "prompt_types": 4, "segment_types": 4, "type_vocab_size": 2, "adapter_rank": 4,
    "input_embedding_size": 32, "output_embedding_size": 32, "moe_router_hidden_size": 16,
}  # fmt: skip
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def shrunk(model_type: str, blocks: int = 5, **settings: Any) -> dict[str, Any]:
    """The settings of a tiny config of a type, with its `model_type`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = CONFIG_MAPPING[model_type]()
    defaults = usual.to_dict()
    found: dict[str, Any] = {}
    for name in sorted(defaults.keys() | set(getattr(usual, "attribute_map", {}).values())):
        value = defaults[name] if name in defaults else getattr(usual, name, None)
        number = (value is None and name not in _MAY_BE_NONE) or type(value) in (int, float)
        if name in COUNTS:
            found[name] = blocks
        elif name == "num_key_value_heads" and "kv_lora_rank" in defaults:
            found[name] = SIZES["num_attention_heads"]  # latent attention has no groups
        elif name in SIZES and number:
            found[name] = SIZES[name]
        elif name in TOKENS:
            found[name] = TOKENS[name]
        elif name == "is_decoder":
            found[name] = True
    return {"model_type": model_type, **found, **SPECIAL.get(model_type, {}), **settings}


LARGEST = 10_000_000  # parameters of a model that counts as tiny
_MAY_BE_NONE = {"sliding_window", "q_lora_rank", "n_inner"}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_mamba": {"intermediate_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba", "attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"local_attention": 8},
    "roberta": {"max_position_embeddings": 80},  # which start after the number of the padding token
    "roberta-prelayernorm": {"max_position_embeddings": 80},
    "xlm-roberta": {"max_position_embeddings": 80},
    "xlm-roberta-xl": {"max_position_embeddings": 80},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_type_base(folder: Path, model_type: str, blocks: int = 5, *, seed: int = 0, **settings: Any) -> Path:
    """Save a tiny random model of a causal model type with its tokenizer, as transformers saves it.

    Args:
        folder: where it goes.
        model_type: a key of transformers' causal mapping.
        blocks: how many.
        seed: of the weights.
        settings: further settings of the config.

    Raises:
        ValueError: the model is not tiny.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny_tokenizer(folder)
    config = AutoConfig.for_model(**shrunk(model_type, blocks, **settings))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size} parameters: its sizes have other names, or lie in configs within its config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # away from zero, one and each other
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.08))
    model.save_pretrained(folder)
    return folder
