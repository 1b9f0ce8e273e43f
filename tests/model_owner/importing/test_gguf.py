"""GGUF files: the imported base is the model that llama.cpp runs, or what would be lost is named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gguf_files import as_gguf
from model_owner.test_pack import logits, plain
from offsite.config import ImportSpec
from offsite.errors import IncompatibleError, OffsiteError, StorageError, UsageError
from offsite.model_owner.importing.gguf_rotary import llama3_factors, llama3_parameters
from offsite.model_owner.importing.import_model import import_model
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import MakeBase, each_form

gguf = pytest.importorskip("gguf")
FP32 = ImportSpec(dtype="fp32")
FORMS: dict[str, dict[str, Any]] = {
    "llama tied, grouped": {"family": "llama"},
    "llama untied": {"family": "llama", "tied": False},
    "llama, biases": {"family": "llama", "kv_heads": 4, "attention_bias": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "qwen2_moe": {"family": "qwen2_moe"},
    "qwen3_moe": {"family": "qwen3_moe", "norm_topk_prob": True},
    "gemma2": {"family": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 7.0, "final_logit_softcapping": 3.0},
    "gemma3": {"family": "gemma3_text", "sliding_window": 4},
    "phi3": {"family": "phi3"},
    "stablelm": {"family": "stablelm", "use_qkv_bias": True},
    "gpt2 tied": {"family": "gpt2"},
    "bloom": {"family": "bloom"},
    "falcon, one key head": {"family": "falcon"},
}


def gguf_of(base_of: MakeBase, tmp_path: Path, form: str = "llama untied", **written: Any) -> tuple[Path, Path]:
    base = base_of(**FORMS[form])
    return base, as_gguf(base, tmp_path / "model.gguf", **written)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def refusal(file: Path, out: Path) -> OffsiteError:
    with pytest.raises(OffsiteError) as caught:
        import_model(file, out, FP32)
    assert not out.exists()
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("form", each_form(FORMS))
def test_each_architecture_comes_back_as_it_was(base_of: MakeBase, tmp_path: Path, form: str) -> None:
    base, file = gguf_of(base_of, tmp_path, form)
    made = import_model(file, tmp_path / "base", FP32)
    before, after = load_file(base / WEIGHTS), load_file(made.folder / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert torch.allclose(logits(plain(made.folder)), logits(plain(base)), rtol=1e-4, atol=1e-4)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("original", "factor"), [(8192, 8.0), (8192, 32.0), (16, 8.0), (64, 4.0)])
def test_the_scaling_of_llama3(base_of: MakeBase, tmp_path: Path, original: int, factor: float) -> None:
    """A model with this scaling, and the file with its factors, give the same logits after the import."""
    rotary = {**LLAMA3, "rope_theta": 1e6, "factor": factor, "original_max_position_embeddings": original}
    base = base_of("llama", tied=False, rope_parameters=rotary)
    waves = 2 * math.pi * 1e6 ** (np.arange(0, 8, 2) / 8)
    factors = llama3_factors(waves, factor, original, 1.0, 4.0)
    file = as_gguf(base, tmp_path / "x.gguf", tensors={"rope_freqs.weight": factors})
    made = import_model(file, tmp_path / "base", FP32)
    if (factors > 1).any():
        assert config_of(made.folder)["rope_parameters"]["rope_type"] == "llama3"
    assert torch.allclose(logits(plain(made.folder)), logits(plain(base)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theta", "width", "factor", "original", "high"),
    [(500000.0, 128, 8.0, 8192, 4.0), (500000.0, 64, 32.0, 8192, 4.0), (1e6, 128, 4.0, 32768, 2.0)],
)
def test_parameters_out_of_published_factors(
    theta: float, width: int, factor: float, original: int, high: float
) -> None:
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    factors = llama3_factors(waves, factor, original, 1.0, high).astype(np.float32)
    found = llama3_parameters(factors, theta, width)
    assert found is not None
    assert found["factor"] == pytest.approx(factor)
    ratio = found["original_max_position_embeddings"] / original
    assert found["low_freq_factor"] == pytest.approx(ratio, rel=1e-2)
    assert found["high_freq_factor"] == pytest.approx(high * ratio, rel=1e-2)
    assert llama3_parameters(factors[:-1], theta, width) is None
    assert llama3_parameters(factors[::-1].copy(), theta, width) is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0},
        ),
        ({"rope.freq_base": 5000.0}, {"rope_type": "default", "rope_theta": 5000.0}),
    ],
)
def test_rotary_keys(base_of: MakeBase, tmp_path: Path, more: dict[str, Any], expected: dict[str, Any]) -> None:
    base, file = gguf_of(base_of, tmp_path, more=more)
    made = import_model(file, tmp_path / "base", FP32)
    rotary = config_of(made.folder)["rope_parameters"]
    assert {key: rotary[key] for key in expected} == expected
    known = base_of(**FORMS["llama untied"], rope_parameters={"rope_theta": 10000.0, **expected})
    assert torch.allclose(logits(plain(made.folder)), logits(plain(known)), rtol=1e-4, atol=1e-4)
    assert rotary["rope_theta"] == more.get("rope.freq_base", 10000.0)
    assert base.exists()


def test_a_missing_base_of_the_frequencies_is_llama_cpps(base_of: MakeBase, tmp_path: Path) -> None:
    _, file = gguf_of(base_of, tmp_path, "qwen3", without=("rope.freq_base",))
    made = import_model(file, tmp_path / "base", FP32)
    assert config_of(made.folder)["rope_parameters"]["rope_theta"] == 10000.0


def test_longrope(base_of: MakeBase, tmp_path: Path) -> None:
    long, short = [1.0, 2.0, 3.0, 4.0], [1.0, 1.5, 2.0, 2.5]
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long, "short_factor": short}
    base = base_of("phi3", rope_parameters=rotary, original_max_position_embeddings=16)
    tensors = {"rope_factors_long.weight": np.array(long), "rope_factors_short.weight": np.array(short)}
    file = as_gguf(base, tmp_path / "x.gguf", tensors=tensors)
    made = import_model(file, tmp_path / "base", FP32)
    found = config_of(made.folder)["rope_parameters"]
    assert (found["long_factor"], found["short_factor"]) == (long, short)
    assert torch.allclose(logits(plain(made.folder)), logits(plain(base)), rtol=1e-4, atol=1e-4)
    lone = as_gguf(base, tmp_path / "y.gguf", tensors={"rope_factors_long.weight": np.array(long)})
    assert "rope_factors_short.weight" in refusal(lone, tmp_path / "no").reasons[0]


@pytest.mark.parametrize(
    ("form", "more", "named"),
    [
        ("llama untied", {"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping = 50.0"),
        ("llama untied", {"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping = 30.0"),
        ("llama untied", {"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ("llama untied", {"residual_scale": 0.5}, "llama.residual_scale = 0.5"),
        ("llama untied", {"embedding_scale": 12.0}, "llama.embedding_scale = 12.0"),
        ("llama untied", {"attention.scale": 0.1}, "llama.attention.scale"),
        ("llama untied", {"attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
        ("llama untied", {"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv = 8.0"),
        ("llama untied", {"attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias = 8.0"),
        ("llama untied", {"attention.causal": False}, "llama.attention.causal = False"),
        ("llama untied", {"attention.value_length": 16}, "llama.attention.value_length = 16"),
        ("llama untied", {"attention.layer_norm_epsilon": 1e-3}, "llama.attention.layer_norm_epsilon"),
        ("llama untied", {"attention.head_count_kv": [2, 2, 1, 2, 2]}, "llama.attention.head_count_kv"),
        ("llama untied", {"expert_count": 8}, "llama.expert_count = 8"),
        ("llama untied", {"rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
        ("llama untied", {"rope.freq_base_swa": 5.0}, "llama.rope.freq_base_swa"),
        ("llama untied", {"rope.scaling.type": "dynamic"}, "rope.scaling.type = dynamic"),
        ("llama untied", {"nextn_predict_layers": 1}, "llama.nextn_predict_layers = 1"),
        ("llama untied", {"hidden_activation": "relu"}, "llama.hidden_activation = relu"),
        ("qwen3", {"something.new": 3}, "qwen3.something.new = 3"),
        ("gpt2 tied", {"rope.freq_base": 10000.0}, "gpt2.rope.freq_base"),
        ("falcon, one key head", {"attention.head_count_kv": 2}, "falcon.attention.head_count_kv = 2"),
    ],
)
def test_settings_that_have_no_place_are_refused(
    base_of: MakeBase, tmp_path: Path, form: str, more: dict[str, Any], named: str
) -> None:
    _, file = gguf_of(base_of, tmp_path, form, more=more)
    error = refusal(file, tmp_path / "base")
    assert isinstance(error, IncompatibleError)
    assert "settings that would be lost" in error.what
    assert len(error.reasons) == 1
    assert error.reasons[0].startswith(named)


def test_an_epsilon_and_caps_are_the_files(base_of: MakeBase, tmp_path: Path) -> None:
    more = {"attention.layer_norm_rms_epsilon": 0.25, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
    _, file = gguf_of(base_of, tmp_path, "gemma2", more=more)
    config = config_of(import_model(file, tmp_path / "base", FP32).folder)
    found = [config[key] for key in ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping")]
    assert found == [0.25, 5.0, 2.0]


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.1.ffn_gate.bias", "nextn.weight", "output.bias"])
def test_tensors_that_have_no_place_are_refused(base_of: MakeBase, tmp_path: Path, name: str) -> None:
    _, file = gguf_of(base_of, tmp_path, tensors={name: np.ones(4)})
    error = refusal(file, tmp_path / "base")
    assert "tensors that would be lost" in error.what
    assert error.reasons == (f"unused tensor {name}",)


def test_factors_that_are_no_scaling_of_llama3(base_of: MakeBase, tmp_path: Path) -> None:
    _, file = gguf_of(base_of, tmp_path, tensors={"rope_freqs.weight": np.array([2.0, 1.0, 5.0, 3.0])})
    assert "rope_freqs.weight" in refusal(file, tmp_path / "base").reasons[0]
    _, file = gguf_of(base_of, tmp_path, tensors={"rope_freqs.weight": np.ones(4)})  # scales nothing
    assert import_model(file, tmp_path / "base", FP32).folder.exists()


def test_heads_that_cannot_be_put_back_in_order(base_of: MakeBase, tmp_path: Path) -> None:
    _, file = gguf_of(base_of, tmp_path, without=("attention.head_count_kv",))
    assert "head_count_kv is missing" in refusal(file, tmp_path / "base").reasons[0]


def test_what_is_no_language_model(tmp_path: Path) -> None:
    for kind, architecture, what in (("adapter", "llama", "LoRA adapter"), ("model", "clip", "no language model"),
                                     ("mmproj", "clip", "no language model")):  # fmt: skip
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), architecture)
        writer.add_type(kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        error = refusal(tmp_path / "x.gguf", tmp_path / "base")
        assert isinstance(error, UsageError)
        assert what in error.what


def test_an_architecture_that_is_not_verified(base_of: MakeBase, tmp_path: Path) -> None:
    _, file = gguf_of(base_of, tmp_path)
    file.write_bytes(file.read_bytes().replace(b"llama", b"grok1"))
    error = refusal(file, tmp_path / "base")
    assert "'grok1'" in str(error)


def test_a_truncated_file(base_of: MakeBase, tmp_path: Path) -> None:
    _, file = gguf_of(base_of, tmp_path)
    content = file.read_bytes()
    for length in (len(content) - 100, len(content) // 2, 100, 8):
        file.write_bytes(content[:length])
        assert isinstance(refusal(file, tmp_path / "base"), StorageError)


def test_half_precision_and_capitals(base_of: MakeBase, tmp_path: Path) -> None:
    base = base_of(**FORMS["llama untied"])
    file = as_gguf(base, tmp_path / "MODEL.GGUF", half=True)
    made = import_model(file, tmp_path / "base", FP32)
    expected = {name: t.half().float() if t.ndim > 1 else t for name, t in load_file(base / WEIGHTS).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(made.folder / WEIGHTS).items())
