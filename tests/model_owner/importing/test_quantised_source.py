"""Quantised checkpoints are dequantised or refused by name; settings beside plain weights do no harm."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import bottleneck_return, copied_folder, edit_json, full_return, lora_return, packed
from model_owner.importing.test_import_model import as_bin
from model_owner.test_pack import bits, logits, plain
from offsite.config import ImportSpec, PlugInSpec
from offsite.errors import IncompatibleError, OffsiteError, UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from tiny import MakeBase, Parties

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
LINEAR = "model.layers.1.mlp.down_proj"
I32, U8, F16 = torch.int32, torch.uint8, torch.float16
# For each method: settings in config.json, and the tensors that stand for a linear layer's weight.
FORMS: dict[str, tuple[dict[str, Any], dict[str, torch.dtype]]] = {
    "GPTQ": (GPTQ, {"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32}),
    "AWQ": ({"quant_method": "awq", "bits": 4}, {"qweight": I32, "qzeros": I32, "scales": F16}),
    "AutoRound": ({"quant_method": "auto-round"}, {"qweight": I32, "qzeros": I32, "scales": F16}),
    "torchao": ({"quant_method": "torchao"}, {"weight": torch.int8, "weight_scale": F16}),
    "HQQ": ({"quant_method": "hqq"}, {"W_q": U8, "scale": F16, "zero": F16}),
    "EETQ": ({"quant_method": "eetq"}, {"weight": torch.int8, "weight_scales": F16}),
    "Quark": ({"quant_method": "quark"}, {"weight": torch.float8_e4m3fn, "weight_scale": F16}),
    "FBGEMM FP8": ({"quant_method": "fbgemm_fp8"}, {"weight": torch.float8_e4m3fn, "weight_scale": F16}),
    "ModelOpt": ({"quant_method": "modelopt"}, {"weight": U8, "weight_scale": torch.float8_e4m3fn}),
    "NVFP4": ({"quant_method": "nvfp4"}, {"weight": U8, "weight_scale": torch.float8_e4m3fn}),
    "AQLM": ({"quant_method": "aqlm"}, {"codebooks": F16, "codes": torch.int8, "scales": F16}),
    "VPTQ": ({"quant_method": "vptq"}, {"indices": I32, "weight": torch.int16}),
    "Quanto": ({"quant_method": "quanto"}, {"weight": torch.int8}),
    "BitNet": ({"quant_method": "bitnet"}, {"weight": U8, "weight_scale": F16}),
    "ExLlamaV2": ({"quant_method": "exl2"}, {"q_weight": I32, "q_scale": I32}),
}


def quantised(
    base: Path,
    out: Path,
    settings: dict[str, Any] | None,
    parts: dict[str, torch.dtype],
    key: str = "quantization_config",
) -> Path:
    """A copy of a base in which one linear layer is stored in parts, as a quantised checkpoint has them."""
    copied_folder(base, out)
    tensors = load_file(out / WEIGHTS)
    del tensors[f"{LINEAR}.weight"]
    tensors |= {f"{LINEAR}.{part}": torch.zeros(4, 4).to(dtype) for part, dtype in parts.items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    if settings:
        edit_json(out / "config.json", **{key: settings})
    return out


def refusal(source: Path, out: Path) -> OffsiteError:
    with pytest.raises(OffsiteError) as caught:
        import_model(source, out)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize("method", FORMS)
def test_each_method_is_refused_by_its_name(base_of: MakeBase, tmp_path: Path, method: str) -> None:
    source = quantised(base_of(), tmp_path / "source", *FORMS[method])
    error = refusal(source, tmp_path / "base")
    assert isinstance(error, IncompatibleError)
    assert f"quantised with {method}" in error.what
    assert "the checkpoint that it was made from" in str(error.next_step)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("GPTQ", {"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32}),
        ("AWQ", {"qweight": I32, "qzeros": I32, "scales": F16}),
        ("FP8", {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}),
        ("FP8", {"weight": torch.float8_e5m2}),
        ("bitsandbytes", {"weight": U8, "weight.absmax": U8, "weight.quant_map": torch.float32}),
        ("bitsandbytes", {"weight": torch.int8, "SCB": torch.float32}),
        ("compressed-tensors", {"weight_packed": I32, "weight_scale": F16, "weight_shape": I32}),
        ("MXFP4", {"down_proj_blocks": U8, "down_proj_scales": U8}),
        ("MLX", {"weight": torch.uint32, "scales": F16, "biases": F16}),
        ("HQQ", {"W_q": U8}),
    ],
)
def test_tensors_say_it_where_the_config_does_not(
    base_of: MakeBase, tmp_path: Path, name: str, parts: dict[str, torch.dtype]
) -> None:
    error = refusal(quantised(base_of(), tmp_path / "source", None, parts), tmp_path / "base")
    assert f"quantised with {name}" in error.what


@pytest.mark.parametrize(
    ("name", "key", "settings"),
    [
        ("bitsandbytes", "quantization_config", {"load_in_4bit": True}),
        ("MLX", "quantization", {"group_size": 64, "bits": 4}),
        ("compressed-tensors", "compression_config", {"format": "pack-quantized"}),
    ],
)
def test_older_settings(base_of: MakeBase, tmp_path: Path, name: str, key: str, settings: dict[str, Any]) -> None:
    parts = {"weight": torch.uint32} if name == "MLX" else {"weight": U8}
    source = quantised(base_of(), tmp_path / "source", settings, parts, key)
    assert f"quantised with {name}" in refusal(source, tmp_path / "base").what


@pytest.mark.parametrize(
    ("package", "pip", "settings"),
    [
        ("bitsandbytes", "bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("compressed_tensors", "compressed-tensors", {"quant_method": "compressed-tensors"}),
    ],
)
def test_the_package_to_install(
    base_of: MakeBase,
    tmp_path: Path,
    package: str,
    pip: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *by: None if name == package else find(name, *by))
    error = refusal(quantised(base_of(), tmp_path / "source", settings, {"weight": U8}), tmp_path / "base")
    assert isinstance(error, UsageError)
    assert error.next_step == f"pip install {pip}"


def test_a_quantised_bin_file(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    weights[f"{LINEAR}.qweight"] = weights.pop(f"{LINEAR}.weight").int()
    torch.save(weights, source / "pytorch_model.bin")
    edit_json(source / "config.json", quantization_config=GPTQ)
    assert "quantised with GPTQ" in refusal(source, tmp_path / "base").what


def test_a_quantised_folder_is_no_base(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    source = quantised(base_of(), tmp_path / "source", *FORMS["GPTQ"])
    with pytest.raises(IncompatibleError, match="quantised with GPTQ"):
        packed(source, tmp_path / "bundle", parties)


def in_fp8(base: Path, out: Path, block: int = 16) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base whose blocks' linear layers are in FP8 with a scale for each square, and the weights that these mean."""
    copied_folder(base, out)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / WEIGHTS).items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = meant[name] = tensor
            continue
        rows, columns = (size // block for size in tensor.shape)
        squares = tensor.reshape(rows, block, columns, block)
        scales = squares.abs().amax((1, 3)) / 448  # the largest value of the dtype
        small = (squares / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored |= {name: small.reshape(tensor.shape), f"{name}_scale_inv": scales}
        meant[name] = (small.float() * scales[:, None, :, None]).reshape(tensor.shape)
    save_file(stored, out / WEIGHTS, {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    edit_json(out / "config.json", quantization_config=settings)
    return out, meant


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fp8_is_dequantised(base_of: MakeBase, tmp_path: Path, family: str) -> None:
    source, meant = in_fp8(base_of(family), tmp_path / "fp8")
    made = import_model(source, tmp_path / "base", ImportSpec(dtype="fp32"))
    found = load_file(made.folder / WEIGHTS)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    assert "FP8" in read_record(made.folder).notes[0]
    assert logits(plain(made.folder)).isfinite().all()


@pytest.mark.parametrize("form", ["config", "nested", "file", "bin"])
def test_stale_settings_are_left_out(base_of: MakeBase, tmp_path: Path, form: str) -> None:
    base = base_of()
    source = as_bin(base, tmp_path / "source") if form == "bin" else copied_folder(base, tmp_path / "source")
    if form == "file":
        (source / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    else:
        key = "quantization" if form == "nested" else "quantization_config"
        edit_json(source / "config.json", **{key: GPTQ})
    made = import_model(source, tmp_path / "base")
    assert bits(made.folder) == bits(base)
    assert "quanti" not in (made.folder / "config.json").read_text()
    assert any("left out settings of" in note for note in read_record(made.folder).notes)
    assert torch.equal(logits(plain(made.folder)), logits(plain(base)))


@pytest.mark.parametrize("kind", ["gptq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_stale_settings_through_the_whole_chain(base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str) -> None:
    """The base is the publisher's folder itself; the bundle and the merged model load, and hold plain weights."""
    base = copied_folder(base_of(), tmp_path / "base")
    edit_json(base / "config.json", quantization_config={**GPTQ, "quant_method": kind, "load_in_4bit": True})
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, lambda name, shipped: shipped + 1)
    accepted = intake(returned.folder, parties.owner)
    merged = plug_in(Base(base), accepted, tmp_path / "merged", PlugInSpec(), parties.owner).folder
    for folder in (base, bundle.folder, merged):
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        assert model.config.model_type == "llama"
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(load_file(merged / WEIGHTS)[name], load_file(base / WEIGHTS)[name] + 1)
    assert torch.isfinite(logits(plain(merged))).all()  # as transformers loads it, without us
    again = import_model(merged, tmp_path / "again")
    assert open_checkpoint(again.folder).tensors.keys() == open_checkpoint(base).tensors.keys()


@pytest.mark.parametrize("make", [lora_return, bottleneck_return])
def test_stale_settings_and_adapters(base_of: MakeBase, tmp_path: Path, parties: Parties, make: Any) -> None:
    base = copied_folder(base_of(), tmp_path / "base")
    edit_json(base / "config.json", quantization_config=GPTQ)
    bundle = packed(base, tmp_path / "bundle", parties)
    accepted = intake(make(bundle, tmp_path / "return", parties.data_owner).folder, parties.owner)
    plugged = plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(), parties.owner)
    assert plugged.manifest.form == "adapter"
