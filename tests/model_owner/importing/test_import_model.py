"""Importing: safetensors are copied, .bin goes through transformers as plain weights, and no code runs."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from artifacts import copied_folder, edit_json
from model_owner.test_pack import bits, logits, plain
from offsite.config import ImportSpec
from offsite.errors import IncompatibleError, OffsiteError, StorageError, UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from tiny import MakeBase


def as_bin(base: Path, out: Path) -> Path:
    shutil.copytree(base, out)
    torch.save(load_file(out / WEIGHTS), out / "pytorch_model.bin")
    (out / WEIGHTS).unlink()
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_safetensors_folder(base_of: MakeBase, tmp_path: Path, family: str) -> None:
    base = base_of(family)
    made = import_model(base, tmp_path / "out")
    assert bits(made.folder) == bits(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.folder / name).read_bytes() == (base / name).read_bytes()
    assert torch.equal(logits(plain(made.folder)), logits(plain(base)))


def test_another_dtype(base_of: MakeBase, tmp_path: Path) -> None:
    base = copied_folder(base_of(), tmp_path / "base")
    edit_json(base / "config.json", torch_dtype="float32")
    made = import_model(base, tmp_path / "out", ImportSpec(dtype="bf16"))
    assert {t.dtype for t in open_checkpoint(made.folder).tensors.values()} == {"BF16"}
    config = json.loads((made.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    expected = plain(base, torch.bfloat16).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in plain(made.folder, torch.bfloat16).state_dict().items()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bin_folder(base_of: MakeBase, tmp_path: Path, family: str) -> None:
    base = base_of(family)
    made = import_model(as_bin(base, tmp_path / "bin"), tmp_path / "out")
    assert bits(made.folder) == bits(base)
    assert not list(made.folder.glob("*.bin"))


def test_bin_folder_without_a_tensor_is_refused(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    del weights["model.layers.1.mlp.down_proj.weight"]
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(IncompatibleError) as caught:
        import_model(source, tmp_path / "out")
    assert list(caught.value.reasons) == ["missing tensor model.layers.1.mlp.down_proj.weight"]
    assert not (tmp_path / "out").exists()


def test_bin_folder_with_more_blocks_than_its_config_is_refused(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    edit_json(source / "config.json", num_hidden_layers=4)
    with pytest.raises(IncompatibleError) as caught:
        import_model(source, tmp_path / "out")
    assert "unexpected tensor model.layers.4.mlp.down_proj.weight" in caught.value.reasons


def test_bin_folder_with_another_shape_is_refused(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    weights["model.norm.weight"] = torch.ones(3)
    torch.save(weights, source / "pytorch_model.bin")
    with pytest.raises(IncompatibleError, match="not those of its config") as caught:
        import_model(source, tmp_path / "out")
    assert any("mismatched tensor model.norm.weight" in reason for reason in caught.value.reasons)


def test_masks_and_frequencies_in_a_bin_file_are_left_out(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, source / "pytorch_model.bin")
    assert bits(import_model(source, tmp_path / "out").folder) == bits(base_of())


def test_an_adapter_beside_a_bin_file_is_refused(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "bin")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(IncompatibleError, match="not a plain checkpoint"):
        import_model(source, tmp_path / "out")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {os.environ['OFFSITE_TEST_MARK']}",))


def test_pickle_that_runs_code(base_of: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "it-ran"
    monkeypatch.setenv("OFFSITE_TEST_MARK", str(mark))
    source = as_bin(base_of(), tmp_path / "evil")
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "evil": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(OffsiteError) as caught:
        import_model(source, tmp_path / "out")
    assert not mark.exists()
    assert caught.value.next_step
    assert not (tmp_path / "out").exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # so it would have run


def test_raw_pickle(base_of: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "it-ran"
    monkeypatch.setenv("OFFSITE_TEST_MARK", str(mark))
    source = as_bin(base_of(), tmp_path / "evil")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(OffsiteError):
        import_model(source, tmp_path / "out")
    assert not mark.exists()


def test_code_that_the_config_names(base_of: MakeBase, tmp_path: Path) -> None:
    source = as_bin(base_of(), tmp_path / "evil")
    mark = tmp_path / "it-ran"
    (source / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: ...\n")
    edit_json(source / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    import_model(source, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out" / "evil.py").exists()


def test_family_that_is_not_supported(base_of: MakeBase, tmp_path: Path) -> None:
    source = copied_folder(base_of(), tmp_path / "source")
    edit_json(source / "config.json", model_type="t5")
    for folder in (source, as_bin(source, tmp_path / "bin")):
        with pytest.raises(IncompatibleError, match="'t5' are not supported"):
            import_model(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_is_no_model(base_of: MakeBase, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "file.txt", tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(UsageError, match="is no model"):
            import_model(source, tmp_path / "out")


def test_truncated(base_of: MakeBase, tmp_path: Path) -> None:
    source = copied_folder(base_of(), tmp_path / "source")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(StorageError, match="truncated"):
        import_model(source, tmp_path / "out")
    broken = as_bin(base_of(), tmp_path / "bin")
    (broken / "pytorch_model.bin").write_bytes((broken / "pytorch_model.bin").read_bytes()[:-200])
    with pytest.raises(OffsiteError):
        import_model(broken, tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(OffsiteError):
        import_model(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
