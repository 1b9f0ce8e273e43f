"""Converts the settings of rotary position embeddings in a GGUF file to those of a transformers config.

llama.cpp divides the frequency of each pair of dimensions by a factor. The factors are in the tensor `rope_freqs`
(Llama 3.1 and later), or in `rope_factors_long` and `rope_factors_short` (LongRoPE). transformers has `rope_parameters`
instead.
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
    """Write the rotary settings of a GGUF file into a config, which is changed in place.

    Args:
        metadata: the file's keys and values.
        factors: the file's tensors of frequency factors, keyed by name.
        config: the config that transformers made from the file.
        partial: whether models of the family can rotate only some dimensions of each head.

    Returns:
        An error message for each setting or tensor that the config cannot express.
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
    """Set how many dimensions of each head are rotated; return a list with an error message if the config cannot.

    Args:
        found: the file's keys for rotary positions, without the name of the architecture.
        metadata: all keys and values of the file.
        config: the config, whose `head_dim` may be set.
        rotary: the new `rope_parameters`, changed in place.
        partial: whether models of the family can rotate only some dimensions of each head.
    """
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
    """Write the file's way of scaling rotary frequencies for long contexts into `rotary`, the new `rope_parameters`.

    Args:
        found: the file's keys for rotary positions, without the name of the architecture.
        factors: the file's tensors of frequency factors, keyed by name.
        config: the config, whose original context length may be set.
        rotary: the new `rope_parameters`, changed in place.

    Returns:
        An error message for each setting that transformers has no parameter for.
    """
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
    """Write the settings of LongRoPE into `rotary`, and return error messages if the file's settings are not complete.

    LongRoPE has one list of frequency factors for texts within the original context, and one for longer texts.

    Args:
        kind: the file's type of scaling.
        factors: the file's tensors of factors, keyed by name.
        config: the config, whose original context length may be set.
        rotary: the new `rope_parameters`, changed in place.
        before: the original context length in tokens.
        attention: the file's factor of attention; 0 if it has none.
    """
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
    """Write Llama 3's scaling into `rotary`, the new `rope_parameters`, so that it results in these factors.

    Returns a list with an error message if no parameters of this scaling result in them.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(head * rotary.get("partial_rotary_factor", 1.0))
    found = llama3_parameters(factors, rotary["rope_theta"], width)
    if found is None:
        return [f"{FREQUENCIES} holds factors that are not those of the scaling of Llama 3"]
    rotary |= {"rope_type": "llama3", **found}
    return []


def llama3_parameters(factors: Factors, theta: float, width: int) -> dict[str, float | int] | None:
    """The `rope_parameters` of Llama 3's scaling that give these factors; None if no such parameters exist.

    A pair of dimensions rotates with a wavelength of w tokens. Its factor f_i is 1 if w is short, and f if w is long.
    In between, 1/f_i is linear in 1/w: 1/f_i = (1 - s)/f + s with s = (original/w - low)/(high - low). Only
    original/low and original/high matter, so low is 1.

    Args:
        factors: the frequency factor of each pair of dimensions, shortest wavelength first.
        theta: the base of the rotary frequencies.
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
    """Candidates (original context, `high_freq_factor`) that may give these factors with a `low_freq_factor` of 1."""
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
    """The factors by which Llama 3's scaling divides rotary frequencies, one for each wavelength.

    Args:
        waves: the wavelengths in tokens.
        factor: the factor of long wavelengths.
        original: the original context length in tokens.
        low: `low_freq_factor`.
        high: `high_freq_factor`.
    """
    smooth = np.clip((original / waves - low) / (high - low), 0.0, 1.0)
    result: npt.NDArray[np.float64] = 1.0 / ((1 - smooth) / factor + smooth)
    return result
