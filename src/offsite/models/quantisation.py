"""Recognises quantised checkpoints by their settings and by their tensors. Torch-free.

Settings are not enough: tools that dequantise or merge a model often leave `quantization_config` behind. So only a
checkpoint with quantised tensors counts as quantised; if the tensors are plain, such settings are left out.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

KEYS = ("quantization_config", "compression_config", "quantization")  # 2nd: old compressed-tensors; 3rd: MLX
# Files in which older tools store the settings.
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quant_strategy.json")
_NAMES = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8",
    "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4",
    "modelopt": "ModelOpt", "torchao": "torchao", "hqq": "HQQ", "eetq": "EETQ", "quark": "Quark", "aqlm": "AQLM",
    "quanto": "Quanto", "vptq": "VPTQ", "higgs": "HIGGS", "spqr": "SpQR", "bitnet": "BitNet", "fp_quant": "FP-Quant",
    "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "metal": "Metal", "sinq": "SINQ", "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3", "fouroversix": "Four Over Six", "gemma": "Gemma's own quantisation", "mlx": "MLX",
}  # fmt: skip
# Ends of names of tensors that only quantised checkpoints hold, the most specific first.
_SIGNS = (
    (re.compile(r"\.quant_state\.bitsandbytes__\w+|\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB)$"),
     "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_zero_point|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.(codebooks|codes)$"), "aqlm"),
    (re.compile(r"_blocks$"), "mxfp4"),
    (re.compile(r"\.W_q$"), "hqq"),
    (re.compile(r"\.(q_weight|q_scale|q_perm|q_invperm|q_groups)$"), "exl2"),
    (re.compile(r"\.trellis$"), "exl3"),
    (re.compile(r"\.(weight_scale_inv|weight_scale|weight_scale_2|qscale_weight|scale_weight)$"), "fp8"),
    (re.compile(r"\.(qweight|qzeros)$"), "awq"),
)  # fmt: skip
_PLAIN = {"F64", "F32", "F16", "BF16"}
_SMALL_FLOATS = re.compile(r"F[468]_|F4|F6|F8")


def display_name(method: str) -> str:
    """The usual name of a quantisation method, such as "GPTQ"; `method` is its key in configs."""
    return _NAMES.get(method, method)


def method_in_settings(config: Mapping[str, Any]) -> str | None:
    """The key of the quantisation method that a config, or a config nested in it, names; None if it names none."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in KEYS:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:
                return _method(settings, key)
    return None


def _method(settings: Mapping[str, Any], key: str) -> str:
    """The quantisation method of the settings that a config has under `key`; "unknown" if it cannot be identified."""
    named = settings.get("quant_method")
    if isinstance(named, str) and named:
        return named[:64]
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if key == "compression_config":
        return "compressed-tensors"
    return "mlx" if key == "quantization" else "unknown"


def method_of_tensors(tensors: Iterable[tuple[str, str]]) -> str | None:
    """The key of the method by which tensors are quantised; None if they are plain.

    Args:
        tensors: pairs of a tensor's name and its safetensors dtype.
    """
    tensors = list(tensors)
    for pattern, method in _SIGNS:
        if any(pattern.search(name) for name, _ in tensors):
            return method
    weights = {dtype for name, dtype in tensors if name.endswith(".weight")}
    if any(_SMALL_FLOATS.match(dtype) for dtype in weights):
        return "fp8"
    if "U32" in weights:
        return "mlx"
    return "unknown" if weights - _PLAIN else None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config without its settings of quantisation, also in nested configs."""
    return {
        key: plain_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }
