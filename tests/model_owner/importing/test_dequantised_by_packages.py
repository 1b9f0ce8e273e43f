"""Checkpoints of bitsandbytes and compressed-tensors become the weights that these packages compute with."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import copied_folder, edit_json
from model_owner.test_pack import logits, plain
from offsite.config import ImportSpec
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import MakeBase

FP32 = ImportSpec(dtype="fp32")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(base_of: MakeBase, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = base_of()
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**how))
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "source" / name)
    made = import_model(tmp_path / "source", tmp_path / "base", FP32)
    expected = model.dequantize(dtype=model.dtype).state_dict()
    found = load_file(made.folder / WEIGHTS)
    assert found.keys() == load_file(base / WEIGHTS).keys()
    assert all(torch.allclose(found[name], expected[name].float(), atol=1e-2) for name in found)
    assert any(not torch.equal(found[name], tensor) for name, tensor in load_file(base / WEIGHTS).items())
    assert "bitsandbytes" in read_record(made.folder).notes[0]
    assert logits(plain(made.folder)).isfinite().all()


@pytest.mark.parametrize("kind", ["int", "float"])
def test_compressed_tensors(base_of: MakeBase, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    source = copied_folder(base_of(), tmp_path / "source")
    stored, meant = {}, {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if ".layers." not in name or tensor.ndim != 2:
            stored[name] = meant[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / (127 if kind == "int" else 448)
        small = (tensor / scale).round().to(torch.int8) if kind == "int" else (tensor / scale).to(torch.float8_e4m3fn)
        stored |= {name: small, f"{name}_scale": scale}
        meant[name] = small.float() * scale
    save_file(stored, source / WEIGHTS, {"format": "pt"})
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    settings = {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    edit_json(source / "config.json", quantization_config=settings)
    made = import_model(source, tmp_path / "base", FP32)
    found = load_file(made.folder / WEIGHTS)
    assert found.keys() == meant.keys()
    assert all(torch.allclose(found[name], meant[name], rtol=1e-5, atol=1e-6) for name in meant)
    assert "compressed-tensors" in read_record(made.folder).notes[0]
