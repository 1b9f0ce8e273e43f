"""The rotary positions of a GGUF file: keys of its metadata and tensors of factors, as settings of a config.

llama.cpp divides the frequency of each pair of dimensions by the tensor `rope_freqs` (the scaling of Llama 3.1 and
later), or by `rope_factors_long` and `rope_factors_short` (LongRoPE); transformers has parameters in their place.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
_THETA = 10_000.0  # llama.cpp's, where a file has none
_PUBLISHED = (8192, 1.0, 4.0)  # of every Llama: original context, and factors of low and of high frequencies
_CLOSE = 1e-3

Factors = npt.NDArray[np.float32]


def carry_rotary(
    metadata: Mapping[str, Any], factors: Mapping[str, Factors], config: "PretrainedConfig", *, partial: bool
) -> list[str]:
    """Write a file's rotary settings into the config.

    Args:
        metadata: the file's keys and values.
        factors: the tensors of factors that the file has, by name.
        config: the config that transformers made of the file.
        partial: whether the family can rotate a part of each head alone.

    Returns:
        One sentence for each setting or tensor that the config has no place for.
    """
    prefix = f"{metadata['general.architecture']}."
    found = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(f"{prefix}rope.")}
    layers = getattr(config, "rope_parameters", None)
    if not isinstance(layers, dict):
        named = [f"{prefix}{name}" for name in found if name != "rope.scaling.finetuned"]
        return [f"{name}: models of type {config.model_type} have no rotary positions" for name in (*named, *factors)]
    nested = "full_attention" in layers
    rotary = dict(layers["full_attention"] if nested else layers)
    rotary = {key: value for key, value in rotary.items() if key == "partial_rotary_factor"}
    rotary |= {"rope_type": "default", "rope_theta": float(found.get("rope.freq_base", _THETA))}
    problems = _width(found, metadata, config, rotary, partial=partial)
    problems += _scaling(found, factors, config, rotary)
    if nested:
        windows = {"rope_type": "default", "rope_theta": float(found.get("rope.freq_base_swa", _THETA))}
        config.rope_parameters = {"sliding_attention": windows, "full_attention": rotary}
    else:
        if found.get("rope.freq_base_swa", rotary["rope_theta"]) != rotary["rope_theta"]:
            problems.append(f"{prefix}rope.freq_base_swa: models of type {config.model_type} have one base alone")
        config.rope_parameters = rotary
    return problems


def _width(
    found: Mapping[str, Any], metadata: Mapping[str, Any], config: Any, rotary: dict[str, Any], *, partial: bool
) -> list[str]:
    """The number of dimensions of a head that are rotated."""
    prefix = f"{metadata['general.architecture']}."
    if f"{prefix}attention.key_length" not in metadata and "head_dim" in config.to_dict():
        # llama.cpp's; transformers takes the rotated width, or the default of its class
        config.head_dim = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = found.get("rope.dimension_count", head)
    if partial:
        rotary["partial_rotary_factor"] = width / head
        return []
    if width != head:
        return [f"{prefix}rope.dimension_count = {width}: models of type {config.model_type} rotate all {head}"]
    return []


def _scaling(
    found: Mapping[str, Any], factors: Mapping[str, Factors], config: Any, rotary: dict[str, Any]
) -> list[str]:
    kind = found.get("rope.scaling.type") or ("longrope" if LONG in factors else "linear")
    factor = float(found.get("rope.scaling.factor") or found.get("rope.scale_linear") or 1.0)
    context = int(config.max_position_embeddings)
    before = int(found.get("rope.scaling.original_context_length") or context)
    if kind == "longrope" or LONG in factors or SHORT in factors:
        return _long(kind, factors, config, rotary, before, float(found.get("rope.scaling.attn_factor", 0.0)))
    if FREQUENCIES in factors:
        ones = bool(np.allclose(factors[FREQUENCIES], 1.0))
        if not ones and (kind not in ("none", "linear") or factor != 1.0):
            return [f"rope.scaling.type = {kind} and {FREQUENCIES}: two ways of scaling at once"]
        return [] if ones else _frequencies(factors[FREQUENCIES], config, rotary)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return []
    if kind == "linear":
        rotary |= {"rope_type": "linear", "factor": factor}
        return []
    if kind != "yarn":
        return [f"rope.scaling.type = {kind}: expected none, linear, yarn or longrope"]
    if found.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        return [f"rope.scaling.yarn_ext_factor = {found['rope.scaling.yarn_ext_factor']}: expected 1"]
    rotary |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": before,
        "beta_fast": float(found.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(found.get("rope.scaling.yarn_beta_slow", 1.0)),
    }
    attention = float(found.get("rope.scaling.attn_factor", found.get("rope.scaling.yarn_attn_factor", 1.0)))
    if attention != 1.0:
        rotary["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return []


def _long(
    kind: str, factors: Mapping[str, Factors], config: Any, rotary: dict[str, Any], before: int, attention: float
) -> list[str]:
    """LongRoPE: one list of factors for texts within the original context, one for longer ones."""
    missing = [name for name in (LONG, SHORT) if name not in factors]
    if missing or kind not in ("longrope", "linear", "none"):
        return [f"rope.scaling.type = {kind} without the tensor {name}" for name in missing or (LONG,)]
    rotary |= {
        "rope_type": "longrope",
        "long_factor": factors[LONG].tolist(),
        "short_factor": factors[SHORT].tolist(),
        "original_max_position_embeddings": before,
    }
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = before
    ratio = config.max_position_embeddings / before
    usual = math.sqrt(1 + math.log(ratio) / math.log(before)) if ratio > 1 else 1.0
    if attention and abs(attention - usual) > _CLOSE:
        rotary["attention_factor"] = attention
    return []


def _frequencies(factors: Factors, config: Any, rotary: dict[str, Any]) -> list[str]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(head * rotary.get("partial_rotary_factor", 1.0))
    found = llama3_parameters(factors, rotary["rope_theta"], width)
    if found is None:
        return [f"{FREQUENCIES} holds factors that are not those of the scaling of Llama 3"]
    rotary |= {"rope_type": "llama3", **found}
    return []


def llama3_parameters(factors: Factors, theta: float, width: int) -> dict[str, float | int] | None:
    """The parameters of Llama 3's scaling that give these factors; None if there are none.

    The factor of a wave of length w is 1 where w is short, f where it is long, and in between 1/f_i is linear in 1/w:
    1/f_i = (1 - s)/f + s with s = (original/w - low)/(high - low). Only original/low and original/high matter, so low
    is 1.

    Args:
        factors: one for each pair of dimensions, the shortest wave first.
        theta: the base of the frequencies.
        width: the number of rotated dimensions of a head.
    """
    if len(factors) != width // 2:
        return None
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    largest = float(factors.max())
    tries = [(largest, *_PUBLISHED), *((largest, original, 1.0, high) for original, high in _fits(factors, waves))]
    for factor, original, low, high in tries:
        if np.allclose(llama3_factors(waves, factor, original, low, high), factors, rtol=_CLOSE):
            return {
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": round(high, 4),
                "original_max_position_embeddings": original,
            }
    return None


def _fits(factors: Factors, waves: npt.NDArray[np.float64]) -> list[tuple[int, float]]:
    """Pairs of original context and factor of high frequencies that may give these factors, with 1 for low ones."""
    largest, high = float(factors.max()), _PUBLISHED[2]
    between = (factors > 1 + _CLOSE) & (factors < largest * (1 - _CLOSE))
    if not between.any():  # an original context between the last wave that stays and the first that is scaled
        short, long = waves[factors <= 1 + _CLOSE], waves[factors > 1 + _CLOSE]
        return [(math.floor(long.min()), high)] if len(long) and (not len(short) or long.min() >= short.max()) else []
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    if between.sum() == 1:
        return [(round(float(waves[between][0] * (smooth[0] * (high - 1) + 1))), high)]
    slope, start = np.polyfit(1 / waves[between], smooth, 1)  # original/(high - low) and -low/(high - low)
    return [(round(float(-slope / start)), 1.0 - 1.0 / float(start))] if slope > 0 > start else []


def llama3_factors(
    waves: npt.NDArray[np.float64], factor: float, original: int, low: float, high: float
) -> npt.NDArray[np.float64]:
    """The factors of Llama 3's scaling for waves of these lengths."""
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    result: npt.NDArray[np.float64] = 1.0 / ((1 - smooth) / factor + smooth)
    return result
