"""Checkpoints of GPT-OSS as they are published, with experts in MXFP4, become the weights that these bits mean.

OCP Microscaling Formats, version 1.0: blocks of 32 numbers E2M1 (a sign, two bits of an exponent, one of a mantissa)
share a power of two, E8M0, whose exponent has a bias of 127. Two numbers lie in a byte, the lower half first.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import offsite
from artifacts import edit_json, packed
from model_owner.test_pack import logits, plain
from offsite.config import Dtype, ImportSpec
from offsite.errors import OffsiteError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import Parties
from tiny_types import tiny_type_base

SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
STACKS = ("gate_up_proj", "down_proj")


def meaning(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers (E, in, out) that bytes (E, out, G, 16) and exponents (E, out, G) stand for."""
    bits = blocks.numpy()
    codes = np.stack([bits & 15, bits >> 4], -1).reshape(*bits.shape[:-1], 32)
    sign, exponent, mantissa = 1.0 - 2 * (codes >> 3), (codes >> 1) & 3, codes & 1
    sizes = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1.0))
    values = sign * sizes * 2.0 ** (scales.numpy().astype(np.float64) - 127)[..., None]
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).transpose(1, 2).float()


def in_mxfp4(out: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny GPT-OSS with experts in MXFP4, and all weights that it means."""
    tiny_type_base(out, "gpt_oss", 3, intermediate_size=64, dtype="bfloat16")
    draw = torch.Generator().manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / WEIGHTS).items():
        tensor = tensor.bfloat16()
        if not name.endswith(STACKS):
            stored[name] = meant[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
        stored[f"{name}_scales"] = torch.randint(120, 125, shape, dtype=torch.uint8, generator=draw)
        meant[name] = meaning(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    save_file(stored, out / WEIGHTS, {"format": "pt"})
    edit_json(out / "config.json", quantization_config=SETTINGS)
    return out, meant


@pytest.mark.parametrize("dtype", ["fp32", "bf16", None])
def test_mxfp4_is_dequantised(tmp_path: Path, dtype: Dtype | None) -> None:
    source, meant = in_mxfp4(tmp_path / "source")
    made = import_model(source, tmp_path / "base", ImportSpec(dtype=dtype))
    found = load_file(made.folder / WEIGHTS)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name].float(), meant[name].float()) for name in meant)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert "quantization_config" not in (made.folder / "config.json").read_text()
    assert read_record(made.folder).notes == ("dequantised from MXFP4",)
    assert logits(plain(made.folder)).isfinite().all()


def test_the_base_is_packed(tmp_path: Path, parties: Parties) -> None:
    """And what was published, itself, is not: it holds no plain weights."""
    source, _ = in_mxfp4(tmp_path / "source")
    with pytest.raises(OffsiteError, match="MXFP4") as caught:
        packed(source, tmp_path / "bundle", parties)
    assert "offsite import" in str(caught.value.next_step)
    base = import_model(source, tmp_path / "base").folder
    spec = offsite.PackSpec(bottom=1, top=1, keep=1, heal="none")
    bundle = offsite.pack(Base(base), tmp_path / "bundle", "hospital", spec, parties.owner)
    assert offsite.verify_bundle(bundle.folder, parties.data_owner) == bundle


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_a_part_is_missing(tmp_path: Path, part: str) -> None:
    source, _ = in_mxfp4(tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    name = f"model.layers.1.mlp.experts.down_proj_{part}"
    del tensors[name]
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(OffsiteError) as caught:
        import_model(source, tmp_path / "base")
    assert name in "; ".join(caught.value.reasons)
    assert "fetch" in str(caught.value.next_step)
    assert not (tmp_path / "base").exists()
