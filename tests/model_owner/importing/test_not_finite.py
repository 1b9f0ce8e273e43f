"""NaN and infinity in weights are found at import and at packing, by tensor name; nothing is written then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import copied_folder, edit_json, packed
from offsite.config import ImportSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.importing.import_model import import_model
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import MakeBase, Parties, tiny_vision_base

NAMES = ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.4.mlp.up_proj.weight"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def spoilt(base: Path, out: Path, names: list[str], value: float, dtype: str = "fp32") -> Path:
    copied_folder(base, out)
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(out / WEIGHTS).items()}
    for name in names:
        tensors[name].reshape(-1)[-1] = value
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors(base_of: MakeBase, tmp_path: Path, parties: Parties, dtype: str, value: float) -> None:
    source = spoilt(base_of(), tmp_path / "source", NAMES, value, dtype)
    with pytest.raises(IncompatibleError, match="hold NaN or infinity") as caught:
        import_model(source, tmp_path / "base")
    assert {reason.split()[0] for reason in caught.value.reasons} == set(NAMES)
    assert not (tmp_path / "base").exists()
    with pytest.raises(IncompatibleError, match="hold NaN or infinity") as caught:
        packed(source, tmp_path / "bundle", parties)
    assert {reason.split()[0] for reason in caught.value.reasons} == set(NAMES)
    assert not (tmp_path / "bundle").exists()


def test_a_bin_file(base_of: MakeBase, tmp_path: Path) -> None:
    source = spoilt(base_of(), tmp_path / "source", NAMES[1:], float("nan"))
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()
    with pytest.raises(IncompatibleError, match="hold NaN or infinity") as caught:
        import_model(source, tmp_path / "base")
    assert {reason.split()[0] for reason in caught.value.reasons} == set(NAMES[1:])


def test_an_image_encoder(tmp_path: Path) -> None:
    source = tiny_vision_base(tmp_path / "vit", "vit", 2)
    name = next(name for name in load_file(source / WEIGHTS) if "1" in name and name.endswith("weight"))
    broken = spoilt(source, tmp_path / "source", [name], float("inf"))
    with pytest.raises(IncompatibleError) as caught:
        import_model(broken, tmp_path / "base")
    assert caught.value.reasons == (f"{name} holds values that are not finite",)


def test_large_but_finite_values_pass(base_of: MakeBase, tmp_path: Path) -> None:
    """The largest values of float32 become infinite in bf16 by rounding, and are finite otherwise."""
    largest = torch.finfo(torch.float32).max
    source = spoilt(base_of(), tmp_path / "source", NAMES[1:2], largest)
    assert import_model(source, tmp_path / "base").folder.exists()
    with pytest.raises(IncompatibleError, match="hold NaN or infinity"):
        import_model(source, tmp_path / "rounded", ImportSpec(dtype="bf16"))


def test_what_packing_rounds_to_infinity(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base = spoilt(base_of(), tmp_path / "base", NAMES[2:], torch.finfo(torch.float32).max)
    edit_json(base / "config.json", torch_dtype="float32")
    with pytest.raises(IncompatibleError, match="the bundle's weights hold NaN or infinity") as caught:
        packed(base, tmp_path / "bundle", parties, dtype="bf16")
    assert caught.value.reasons == (f"{NAMES[2]} holds values that are not finite",)
    assert not (tmp_path / "bundle").exists()
