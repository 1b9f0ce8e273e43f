"""Tiny GGUF files, written from a tiny base as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file

from offsite.storage.checkpoint_folder import WEIGHTS

gguf = pytest.importorskip("gguf")
Array = npt.NDArray[np.float32]
# For each family: llama.cpp's name of its architecture, and pairs of a key and the config's name for its value.
_COMMON = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "feed_forward_length": "intermediate_size",
}  # fmt: skip
_RMS = {
    **_COMMON, "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim", "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": "rope_local_base_freq",
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}  # fmt: skip
_LAYER_NORMS = {
    **_COMMON, "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_epsilon": "layer_norm_eps",
    "use_parallel_residual": "use_parallel_residual",
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("llama", _RMS), "mistral": ("llama", _RMS), "qwen2": ("qwen2", _RMS), "qwen3": ("qwen3", _RMS),
    "qwen2_moe": ("qwen2moe", _RMS), "qwen3_moe": ("qwen3moe", _RMS), "gemma2": ("gemma2", _RMS),
    "gemma3_text": ("gemma3", _RMS), "phi3": ("phi3", _RMS), "stablelm": ("stablelm", _LAYER_NORMS),
    "gpt2": ("gpt2", {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
                      "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon"}),
    "bloom": ("bloom", {"embedding_length": "hidden_size", "block_count": "n_layer", "attention.head_count": "n_head",
                        "attention.head_count_kv": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon"}),
    "falcon": ("falcon", {"embedding_length": "hidden_size", "block_count": "num_hidden_layers",
                          "attention.head_count": "num_attention_heads",
                          "attention.layer_norm_epsilon": "layer_norm_epsilon"}),
}  # fmt: skip


def as_gguf(
    base: Path,
    file: Path,
    *,
    more: dict[str, Any] | None = None,
    tensors: dict[str, Array] | None = None,
    without: tuple[str, ...] = (),
    half: bool = False,
) -> Path:
    """Write a base as a GGUF file with values in float32.

    Args:
        base: the folder of the base.
        file: the file.
        more: further keys behind the architecture's name, and their values; they take the place of ours.
        tensors: further tensors.
        without: keys to leave out.
        half: matrices in float16, as published files have them at least.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    name, keys = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(file), name)
    settings = {key: _setting(config, own) for key, own in keys.items()}
    settings["rope.dimension_count"] = _rotated(config)
    if config.model_type == "falcon":
        settings |= {"attention.head_count_kv": 1, "feed_forward_length": 4 * config.hidden_size, "context_length": 64}
    if config.model_type == "gpt2":
        settings |= {"feed_forward_length": config.n_inner or 4 * config.n_embd}
    if config.model_type == "bloom":
        settings |= {"feed_forward_length": 4 * config.hidden_size, "context_length": 64}
    for key, value in {**settings, **(more or {})}.items():
        if key not in without and value is not None:
            _add(writer, f"{name}.{key}", value)
    _add_tokenizer(writer, base)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    held = {name: tensor.float().numpy() for name, tensor in load_file(base / WEIGHTS).items()}
    for stored, array in _with_stacks(held).items():
        leaf = next((end for end in (".weight", ".bias") if stored.endswith(end)), "")
        found = names.get_name(stored.removesuffix(leaf)) or names.get_name(
            stored.removesuffix(leaf).removeprefix("transformer.")
        )
        assert found is not None, stored
        ready = np.ascontiguousarray(_as_llama_cpp(array, found + leaf, config).squeeze())
        writer.add_tensor(found + (leaf or ".weight"), ready.astype(np.float16) if half and ready.ndim > 1 else ready)
    for found, array in (tensors or {}).items():
        writer.add_tensor(found, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _setting(config: Any, key: str) -> Any:
    rotary = getattr(config, "rope_parameters", None) or {}
    if key == "rope_theta":
        return rotary.get("full_attention", rotary).get("rope_theta")
    if key == "rope_local_base_freq":
        return rotary.get("sliding_attention", {}).get("rope_theta")
    return getattr(config, key, None)


def _rotated(config: Any) -> int | None:
    rotary = getattr(config, "rope_parameters", None)
    if not rotary:
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * rotary.get("partial_rotary_factor", 1.0))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: Any, base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda pair: pair[1])]
    special = {token["content"] for token in content["added_tokens"]}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])


def _with_stacks(held: dict[str, Array]) -> dict[str, Array]:
    """The tensors, with the matrices of all experts of a block stacked."""
    result: dict[str, Array] = {}
    for name, array in held.items():
        start, experts, rest = name.partition(".experts.")
        if not experts:
            result[name] = array
            continue
        number, _, path = rest.partition(".")
        if number == "0":
            count = sum(other.startswith(f"{start}.experts.") and other.endswith(path) for other in held)
            result[f"{start}.experts.{path}"] = np.stack([held[f"{start}.experts.{i}.{path}"] for i in range(count)])
    return result


def _as_llama_cpp(array: Array, name: str, config: Any) -> Array:
    """A tensor in the order of its values that llama.cpp's converter gives it."""
    kind, leaf = config.model_type, name.split(".", 2)[-1]
    if kind in ("llama", "mistral") and leaf.startswith(("attn_q.", "attn_k.")):
        heads = config.num_attention_heads if leaf.startswith("attn_q.") else config.num_key_value_heads
        return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return array + 1
    if kind == "gpt2" and array.ndim == 2 and leaf.startswith(("attn_qkv", "attn_output", "ffn_")):
        return array.T
    if kind == "bloom" and leaf.startswith("attn_qkv."):
        parts = array.reshape(config.n_head, 3, -1, *array.shape[1:])
        return np.concatenate([parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])
    return array
