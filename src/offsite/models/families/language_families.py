"""The table of language model families, one entry for each. docs/models.md is generated from it. Torch-free.

The tests cover every entry. docs/models.md says how to add one.
"""

from collections.abc import Mapping
from typing import Any

from offsite.errors import IncompatibleError
from offsite.models.families.family import Architecture, Experts, Rule


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _words(
    "architectures model_type dtype torch_dtype vocab_size bos_token_id eos_token_id pad_token_id "
    "tie_word_embeddings use_cache initializer_range"
)
_ROTARY = _words("rope_parameters rope_theta rope_scaling max_position_embeddings")
_GATED = (
    _COMMON
    | _ROTARY
    | _words(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps attention_dropout"
    )
)
_GPT2_SIZES = _words(
    "n_layer num_hidden_layers n_embd n_head n_inner n_positions n_ctx activation_function "
    "layer_norm_epsilon embd_pdrop attn_pdrop resid_pdrop"
)

_QUERIES, _KEYS = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"
_ATTENTION = {
    "self_attn.q_proj": f"{_QUERIES} hidden_size",
    "self_attn.k_proj": f"{_KEYS} hidden_size",
    "self_attn.v_proj": f"{_KEYS} hidden_size",
}
_ATTENTION_OUT = {"self_attn.o_proj": f"hidden_size {_QUERIES}"}
_GATED_MLP = {
    "mlp.gate_proj": "intermediate_size hidden_size",
    "mlp.up_proj": "intermediate_size hidden_size",
    "mlp.down_proj": "hidden_size intermediate_size",
}
_EMBEDDING = {"model.embed_tokens.weight": "vocab_size hidden_size"}
_TWO_NORMS = {"input_layernorm.weight": "hidden_size", "post_attention_layernorm.weight": "hidden_size"}
_HEAD_NORMS = {"self_attn.q_norm.weight": "head_dim", "self_attn.k_norm.weight": "head_dim"}
_PER_HEAD_NORMS = {
    "self_attn.q_layernorm.norms.*.weight": "head_dim",
    "self_attn.k_layernorm.norms.*.weight": "head_dim",
}


def _norm(name: str, size: str = "hidden_size") -> dict[str, str]:
    """The weight and the bias of a norm, each with its size."""
    return {f"{name}.weight": size, f"{name}.bias": size}


def _every(period_key: str, period: int) -> Rule:
    """Make a rule for a block's attention type: full attention in every n-th block, sliding windows in the others.

    n is the value of `period_key` in the config, or `period`.
    """

    def rule(config: Mapping[str, Any], index: int) -> str:
        every = config.get(period_key, period)
        if type(every) is not int or every < 1:
            raise IncompatibleError(
                "the config does not say which blocks have sliding windows",
                reasons=[f"{period_key} = {str(every)[:60]}, expected a number from 1 on"],
                next_step="correct config.json in the base folder",
            )
        return "sliding_attention" if (index + 1) % every else "full_attention"

    return rule


def _late_windows(config: Mapping[str, Any], index: int) -> str:
    """A block's attention type: sliding windows, if switched on, from block `max_window_layers` on, else full."""
    windows = config.get("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
    return "sliding_attention" if windows and index >= config.get("max_window_layers", 28) else "full_attention"


def _rotates(config: Mapping[str, Any], index: int) -> int:
    """Whether a block uses rotary positions, as 1 or 0: all blocks except every n-th (n = `no_rope_layer_interval`)."""
    return int((index + 1) % int(config.get("no_rope_layer_interval", 4)) != 0)


def _windows_without_rotation(config: Mapping[str, Any], index: int) -> str:
    """A block's attention type: sliding windows, if switched on, in blocks without rotary positions, else full."""
    windows = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    listed = config.get("no_rope_layers")
    rotates = _rotates(config, index) if listed is None else listed[index]
    return "sliding_attention" if windows and not rotates else "full_attention"


def _early_windows(config: Mapping[str, Any], index: int) -> str:
    """A block's attention type: sliding windows, if on, in even blocks before `max_window_layers`, else full."""
    windows = config.get("use_sliding_window", False) and index < config.get("max_window_layers", 28)
    return "sliding_attention" if windows and index % 2 == 0 else "full_attention"


def _before_windows(config: Mapping[str, Any]) -> int:
    """The number of blocks before the first one with a sliding window."""
    kinds = config["layer_types"]
    return next((index for index, kind in enumerate(kinds) if kind == "sliding_attention"), len(kinds))


def _up_to_windows(config: Mapping[str, Any]) -> int:
    """The number of blocks up to and including the last one with a sliding window; 0 without any."""
    return max(
        (index + 1 for index, kind in enumerate(config["layer_types"]) if kind == "sliding_attention"), default=0
    )


def _has_experts(config: Mapping[str, Any], index: int) -> bool:
    """Whether a block has experts: every n-th block (n = `decoder_sparse_step`), except those in `mlp_only_layers`."""
    dense, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step", 1)
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or len(dense) > 4096 or type(step) is not int or step < 1:
        raise IncompatibleError(
            "the config does not say which blocks have experts",
            reasons=[f"mlp_only_layers = {str(dense)[:60]}, expected a list; decoder_sparse_step = {str(step)[:60]}"],
            next_step="correct config.json in the base folder",
        )
    return index not in dense and (index + 1) % step == 0


def _is_dense(config: Mapping[str, Any], index: int) -> bool:
    """Whether a block has an ordinary MLP instead of experts."""
    return not _has_experts(config, index)


def _llama_like(model_type: str, class_name: str, keys: frozenset[str], **columns: Any) -> Architecture:
    """A family with Llama's tensor names.

    Args:
        model_type: the model type in configs.
        class_name: the model's class in transformers.
        keys: config keys that a bundle may contain, in addition to those of all these families.
        columns: the fields of `Architecture` that differ from Llama's.
    """
    usual: dict[str, Any] = {
        "embeddings": _EMBEDDING,
        "final": {"model.norm.weight": "hidden_size"},
        "linears": {**_ATTENTION, **_ATTENTION_OUT, **_GATED_MLP},
        "norms": _TWO_NORMS,
        "mlp_out": "mlp.down_proj",
    }
    return Architecture(
        model_type=model_type,
        class_name=class_name,
        blocks="model.layers",
        head="lm_head.weight",
        attention_out="self_attn.o_proj",
        count_keys=("num_hidden_layers",),
        config_keys=_GATED | keys,
        **(usual | columns),
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_EMBEDDER = {"use_bidirectional_attention": "it makes embeddings, and no text"}
_GEMMA: dict[str, Any] = {
    "tied_by_default": True,
    "biases": {"attention_bias": (*_ATTENTION, *_ATTENTION_OUT)},
    "mlp_norms": {"post_feedforward_layernorm": ""},
    "attention_norms": {"post_attention_layernorm": ""},
    "logit_cap": "final_logit_softcapping",
    "refused": _EMBEDDER,
}
_GEMMA_NORMS = _TWO_NORMS | {
    "pre_feedforward_layernorm.weight": "hidden_size",
    "post_feedforward_layernorm.weight": "hidden_size",
}
_GEMMA_KEYS = _words(
    "hidden_activation attention_bias query_pre_attn_scalar sliding_window layer_types "
    "final_logit_softcapping attn_logit_softcapping"
)
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": "shared_expert_intermediate_size hidden_size",
    "mlp.shared_expert.up_proj": "shared_expert_intermediate_size hidden_size",
    "mlp.shared_expert.down_proj": "hidden_size shared_expert_intermediate_size",
    "mlp.shared_expert_gate": "1 hidden_size",
}
_MIXTURE: dict[str, Any] = {
    "mlp_out": "mlp",
    # PEFT takes other targets of such a family for the experts of all blocks: docs/decisions/0010.
    "adapted": (*_ATTENTION, *_ATTENTION_OUT),
}
_MIXTURE_KEYS = _words("hidden_act num_experts_per_tok")


def _qwen_mixture(
    model_type: str, class_name: str, keys: frozenset[str], shared: dict[str, str], **columns: Any
) -> Architecture:
    """A family with Qwen's mixture of experts.

    Args:
        model_type: the model type in configs.
        class_name: the model's class in transformers.
        keys: config keys in addition to those of all families of this kind.
        shared: the linear layers of the expert that all tokens use, with their sizes; empty if there is none.
        columns: other fields of `Architecture`; `counts` are the config keys with the number of experts.
    """
    counts = columns.pop("counts")
    return _llama_like(
        model_type,
        class_name,
        _MIXTURE_KEYS
        | _words("moe_intermediate_size norm_topk_prob mlp_only_layers decoder_sparse_step")
        | _words("use_sliding_window sliding_window")
        | frozenset(counts)
        | keys,
        linears={**_ATTENTION, **_ATTENTION_OUT, **_GATED_MLP, **shared},
        only_if=dict.fromkeys((f"{path}.weight" for path in _GATED_MLP), "!has_experts")
        | dict.fromkeys((*(f"{path}.weight" for path in shared), "mlp.gate.weight"), "has_experts"),
        listed={"mlp_only_layers": _is_dense},
        fixed_settings={"decoder_sparse_step": 1},
        numbered={"mlp.experts": counts},
        experts=Experts(
            path="mlp.experts",
            module="mlp.experts",
            maps={
                "gate_proj": "moe_intermediate_size hidden_size",
                "up_proj": "moe_intermediate_size hidden_size",
                "down_proj": "hidden_size moe_intermediate_size",
            },
            out="down_proj",
            stacks={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
            where=_has_experts,
            others=("mlp.shared_expert.down_proj", "mlp.down_proj") if shared else ("mlp.down_proj",),
        ),
        **_MIXTURE,
        **columns,
    )


FAMILIES = (
    _llama_like(
        "llama",
        "LlamaForCausalLM",
        _words("hidden_act pretraining_tp attention_bias mlp_bias"),
        biases={"attention_bias": (*_ATTENTION, *_ATTENTION_OUT), "mlp_bias": tuple(_GATED_MLP)},
    ),
    _llama_like("mistral", "MistralForCausalLM", _words("hidden_act sliding_window")),
    _llama_like(
        "qwen2",
        "Qwen2ForCausalLM",
        _words("hidden_act use_sliding_window sliding_window max_window_layers layer_types"),
        biases={"": _QKV},
        per_block={"layer_types": _late_windows},
        implied={"max_window_layers": _before_windows},
    ),
    _llama_like(
        "qwen3",
        "Qwen3ForCausalLM",
        _words("hidden_act attention_bias use_sliding_window sliding_window max_window_layers layer_types"),
        norms=_TWO_NORMS | _HEAD_NORMS,
        biases={"attention_bias": (*_ATTENTION, *_ATTENTION_OUT)},
        per_block={"layer_types": _late_windows},
        implied={"max_window_layers": _before_windows},
    ),
    _llama_like(
        "mixtral",
        "MixtralForCausalLM",
        _MIXTURE_KEYS | _words("sliding_window num_local_experts router_jitter_noise"),
        linears={**_ATTENTION, **_ATTENTION_OUT},
        norms=_TWO_NORMS | {"block_sparse_moe.gate.weight": "experts hidden_size"},
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        modules={"block_sparse_moe.gate.weight": "mlp.gate.weight"},
        numbered={"block_sparse_moe.experts": ("num_local_experts",)},
        experts=Experts(
            path="block_sparse_moe.experts",
            module="mlp.experts",
            maps={
                "w1": "intermediate_size hidden_size",
                "w2": "hidden_size intermediate_size",
                "w3": "intermediate_size hidden_size",
            },
            out="w2",
            stacks={"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
        ),
        **_MIXTURE,
    ),
    _qwen_mixture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _words("shared_expert_intermediate_size qkv_bias max_window_layers layer_types"),
        _SHARED_EXPERT,
        counts=("num_experts",),
        norms=_TWO_NORMS | {"mlp.gate.weight": "experts hidden_size"},
        biases={"qkv_bias": _QKV},
        defaults={"num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True},
        per_block={"layer_types": _early_windows},
        implied={"max_window_layers": _up_to_windows},
    ),
    _qwen_mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _words("attention_bias"),
        {},
        counts=("num_local_experts", "num_experts"),  # today's key, and the key in published files
        norms=_TWO_NORMS | _HEAD_NORMS | {"mlp.gate.weight": "experts hidden_size"},
        biases={"attention_bias": (*_ATTENTION, *_ATTENTION_OUT)},
        defaults={"num_local_experts": 128, "num_experts_per_tok": 8},
    ),
    _llama_like(
        "smollm3",
        "SmolLM3ForCausalLM",
        _words(
            "hidden_act attention_bias mlp_bias use_sliding_window sliding_window layer_types no_rope_layers "
            "no_rope_layer_interval"
        ),
        tied_by_default=True,
        biases={"attention_bias": (*_ATTENTION, *_ATTENTION_OUT), "mlp_bias": tuple(_GATED_MLP)},
        per_block={"no_rope_layers": _rotates, "layer_types": _windows_without_rotation},
    ),
    _llama_like(
        "gemma",
        "GemmaForCausalLM",
        _words("hidden_act hidden_activation attention_bias"),
        tied_by_default=True,
        biases={"attention_bias": (*_ATTENTION, *_ATTENTION_OUT)},
        refused=_EMBEDDER,
    ),
    _llama_like(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA_KEYS,
        norms=_GEMMA_NORMS,
        per_block={"layer_types": _every("", 2)},
        **_GEMMA,
    ),
    _llama_like(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA_KEYS | _words("rope_local_base_freq"),
        norms=_GEMMA_NORMS | _HEAD_NORMS,
        per_block={"layer_types": _every("sliding_window_pattern", 6)},
        **_GEMMA,
    ),
    _llama_like(
        "stablelm",
        "StableLmForCausalLM",
        _words(
            "hidden_act layer_norm_eps partial_rotary_factor use_qkv_bias use_parallel_residual hidden_dropout "
            "qk_layernorm"
        ),
        final=_norm("model.norm"),
        norms=_norm("input_layernorm") | _norm("post_attention_layernorm") | _PER_HEAD_NORMS,
        biases={"use_qkv_bias": _QKV},
        only_if=dict.fromkeys(_norm("post_attention_layernorm"), "!use_parallel_residual")
        | dict.fromkeys(_PER_HEAD_NORMS, "qk_layernorm"),
        defaults={"num_attention_heads": 32, "num_key_value_heads": 32},
        numbered={
            "self_attn.q_layernorm.norms": ("num_attention_heads",),
            "self_attn.k_layernorm.norms": ("num_key_value_heads",),
        },
    ),
    _llama_like(
        "phi3",
        "Phi3ForCausalLM",
        _words(
            "hidden_act resid_pdrop embd_pdrop original_max_position_embeddings partial_rotary_factor sliding_window"
        ),
        linears={
            "self_attn.qkv_proj": "any hidden_size",
            **_ATTENTION_OUT,
            "mlp.gate_up_proj": "2*intermediate_size hidden_size",
            "mlp.down_proj": "hidden_size intermediate_size",
        },
    ),
    Architecture(
        model_type="phi",
        class_name="PhiForCausalLM",
        blocks="model.layers",
        embeddings=_EMBEDDING,
        final=_norm("model.final_layernorm") | {"lm_head.bias": "vocab_size"},
        head="lm_head.weight",
        linears={
            **_ATTENTION,
            "self_attn.dense": f"hidden_size {_QUERIES}",
            "mlp.fc1": "intermediate_size hidden_size",
            "mlp.fc2": "hidden_size intermediate_size",
        },
        norms=_norm("input_layernorm")
        | _norm("self_attn.q_layernorm", "head_dim")
        | _norm("self_attn.k_layernorm", "head_dim"),
        biases={"": (*_ATTENTION, "self_attn.dense", "mlp.fc1", "mlp.fc2")},
        only_if=dict.fromkeys(_norm("self_attn.q_layernorm") | _norm("self_attn.k_layernorm"), "qk_layernorm"),
        attention_out="self_attn.dense",
        mlp_out="mlp.fc2",
        count_keys=("num_hidden_layers",),
        config_keys=_COMMON
        | _ROTARY
        | _words(
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "resid_pdrop embd_pdrop attention_dropout hidden_act layer_norm_eps qk_layernorm "
            "partial_rotary_factor"
        ),
    ),
    Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        blocks="transformer.h",
        embeddings={"transformer.wte.weight": "vocab_size n_embd", "transformer.wpe.weight": "n_positions n_embd"},
        final=_norm("transformer.ln_f", "n_embd"),
        head="lm_head.weight",
        head_size="vocab_size n_embd",
        tied_by_default=True,
        linears={
            "attn.c_attn": "n_embd 3*n_embd",
            "attn.c_proj": "n_embd n_embd",
            "mlp.c_fc": "n_embd n_inner",
            "mlp.c_proj": "n_inner n_embd",
        },
        norms=_norm("ln_1", "n_embd") | _norm("ln_2", "n_embd"),
        biases={"": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        transposed=True,
        count_keys=("n_layer", "num_hidden_layers"),
        config_keys=_COMMON
        | _GPT2_SIZES
        | _words("scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn"),
        refused={"scale_attn_by_inverse_layer_idx": "its blocks compute by their position"},
    ),
    Architecture(
        model_type="gptj",
        class_name="GPTJForCausalLM",
        blocks="transformer.h",
        embeddings={"transformer.wte.weight": "vocab_size n_embd"},
        final=_norm("transformer.ln_f", "n_embd") | {"lm_head.bias": "vocab_size"},
        head="lm_head.weight",
        head_size="vocab_size n_embd",
        linears={
            "attn.q_proj": "n_embd n_embd",
            "attn.k_proj": "n_embd n_embd",
            "attn.v_proj": "n_embd n_embd",
            "attn.out_proj": "n_embd n_embd",
            "mlp.fc_in": "n_inner n_embd",
            "mlp.fc_out": "n_embd n_inner",
        },
        norms=_norm("ln_1", "n_embd"),
        biases={"": ("mlp.fc_in", "mlp.fc_out")},
        attention_out="attn.out_proj",
        mlp_out="mlp.fc_out",
        count_keys=("n_layer", "num_hidden_layers"),
        config_keys=_COMMON | _GPT2_SIZES | _words("rotary_dim"),
        limits={"n_positions": 2**16, "rotary_dim": 512},  # every block computes a table of their product
    ),
    Architecture(
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        blocks="gpt_neox.layers",
        embeddings={"gpt_neox.embed_in.weight": "vocab_size hidden_size"},
        final=_norm("gpt_neox.final_layer_norm"),
        head="embed_out.weight",
        linears={
            "attention.query_key_value": "3*hidden_size hidden_size",
            "attention.dense": "hidden_size hidden_size",
            "mlp.dense_h_to_4h": "intermediate_size hidden_size",
            "mlp.dense_4h_to_h": "hidden_size intermediate_size",
        },
        norms=_norm("input_layernorm") | _norm("post_attention_layernorm"),
        biases={
            "": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            "attention_bias": ("attention.query_key_value", "attention.dense"),
        },
        defaults={"attention_bias": True},
        attention_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        count_keys=("num_hidden_layers",),
        config_keys=_COMMON
        | _ROTARY
        | _words(
            "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act attention_dropout "
            "hidden_dropout layer_norm_eps use_parallel_residual attention_bias rotary_pct rotary_emb_base "
            "partial_rotary_factor"
        ),
        spellings={"lm_head.weight": "embed_out.weight"},  # the module's name since transformers 5
    ),
    Architecture(
        model_type="opt",
        class_name="OPTForCausalLM",
        blocks="model.decoder.layers",
        embeddings={
            "model.decoder.embed_tokens.weight": "vocab_size word_embed_proj_dim",
            "model.decoder.embed_positions.weight": "any hidden_size",
            "model.decoder.project_in.weight": "hidden_size word_embed_proj_dim",
        },
        final=_norm("model.decoder.final_layer_norm")
        | {"model.decoder.project_out.weight": "word_embed_proj_dim hidden_size"},
        head="lm_head.weight",
        head_size="vocab_size word_embed_proj_dim",
        tied_by_default=True,
        linears={
            "self_attn.q_proj": "hidden_size hidden_size",
            "self_attn.k_proj": "hidden_size hidden_size",
            "self_attn.v_proj": "hidden_size hidden_size",
            "self_attn.out_proj": "hidden_size hidden_size",
            "fc1": "ffn_dim hidden_size",
            "fc2": "hidden_size ffn_dim",
        },
        norms=_norm("self_attn_layer_norm") | _norm("final_layer_norm"),
        biases={"enable_bias": (*_QKV, "self_attn.out_proj", "fc1", "fc2")},
        only_if={
            "model.decoder.project_in.weight": "word_embed_proj_dim!=hidden_size",
            "model.decoder.project_out.weight": "word_embed_proj_dim!=hidden_size",
            **dict.fromkeys(
                _norm("model.decoder.final_layer_norm"),
                "do_layer_norm_before !_remove_final_layer_norm layer_norm_elementwise_affine",
            ),
            **dict.fromkeys(_norm("self_attn_layer_norm") | _norm("final_layer_norm"), "layer_norm_elementwise_affine"),
        },
        defaults={
            "enable_bias": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "hidden_size": 768,
        },
        mlp_norms={"final_layer_norm": "!do_layer_norm_before"},  # as in OPT-350m
        attention_norms=dict.fromkeys(("self_attn_layer_norm", "final_layer_norm"), "!do_layer_norm_before"),
        attention_out="self_attn.out_proj",
        mlp_out="fc2",
        count_keys=("num_hidden_layers",),
        config_keys=_COMMON
        | _words(
            "hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings "
            "do_layer_norm_before _remove_final_layer_norm word_embed_proj_dim dropout attention_dropout "
            "activation_function enable_bias layer_norm_elementwise_affine init_std"
        ),
    ),
    Architecture(
        model_type="bloom",
        class_name="BloomForCausalLM",
        blocks="transformer.h",
        embeddings={"transformer.word_embeddings.weight": "vocab_size hidden_size"}
        | _norm("transformer.word_embeddings_layernorm"),
        final=_norm("transformer.ln_f"),
        head="lm_head.weight",
        tied_by_default=True,
        linears={
            "self_attention.query_key_value": "3*hidden_size hidden_size",
            "self_attention.dense": "hidden_size hidden_size",
            "mlp.dense_h_to_4h": "4*hidden_size hidden_size",
            "mlp.dense_4h_to_h": "hidden_size 4*hidden_size",
        },
        norms=_norm("input_layernorm") | _norm("post_attention_layernorm"),
        biases={
            "": ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        },
        attention_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        attention_norms={"post_attention_layernorm": "apply_residual_connection_post_layernorm"},
        head_positions="n_head or num_attention_heads",  # ALiBi
        count_keys=("n_layer", "num_hidden_layers"),
        config_keys=_COMMON
        | _words(
            "hidden_size n_embed n_layer num_hidden_layers n_head num_attention_heads layer_norm_epsilon "
            "apply_residual_connection_post_layernorm hidden_dropout attention_dropout pretraining_tp"
        ),
    ),
    Architecture(
        model_type="falcon",
        class_name="FalconForCausalLM",
        blocks="transformer.h",
        embeddings={"transformer.word_embeddings.weight": "vocab_size hidden_size"},
        final=_norm("transformer.ln_f"),
        head="lm_head.weight",
        tied_by_default=True,
        linears={
            "self_attention.query_key_value": "any hidden_size",
            "self_attention.dense": "hidden_size hidden_size",
            "mlp.dense_h_to_4h": "ffn_hidden_size hidden_size",
            "mlp.dense_4h_to_h": "hidden_size ffn_hidden_size",
        },
        norms=_norm("input_layernorm") | _norm("post_attention_layernorm") | _norm("ln_attn") | _norm("ln_mlp"),
        biases={
            "bias": ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        },
        only_if={
            **dict.fromkeys(
                _norm("ln_attn") | _norm("ln_mlp"),
                "parallel_attn num_ln_in_parallel_attn=2 or "
                "parallel_attn !num_ln_in_parallel_attn new_decoder_architecture",
            ),
            **dict.fromkeys(
                _norm("input_layernorm"),
                "!parallel_attn or num_ln_in_parallel_attn=1 or !num_ln_in_parallel_attn !new_decoder_architecture",
            ),
            **dict.fromkeys(_norm("post_attention_layernorm"), "!parallel_attn"),
        },
        defaults={"parallel_attn": True},
        head_positions="alibi",
        attention_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        count_keys=("num_hidden_layers",),
        config_keys=_COMMON
        | _ROTARY
        | _words(
            "hidden_size n_embed num_hidden_layers num_attention_heads num_ln_in_parallel_attn num_kv_heads "
            "layer_norm_epsilon hidden_dropout attention_dropout alibi new_decoder_architecture multi_query "
            "parallel_attn bias ffn_hidden_size activation"
        ),
    ),
)
