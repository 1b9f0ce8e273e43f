"""A plug-in can be the whole multi-modal checkpoint: its language model is the plug-in, all else is as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from artifacts import bottleneck_return, full_return, lora_return, packed
from model_owner.importing.test_text_tower import EACH, text_logits, whole_model
from model_owner.test_check_bundle import TEMPLATE
from model_owner.test_pack import plain
from offsite.config import ImportSpec, PlugInSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plan_plug_in import plan_plug_in
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.verify import verify_plug_in
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import MakeBase, Parties

WHOLE_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.json")


def tuned(source: Path, tmp_path: Path, parties: Parties, make: Any = full_return, **spec: Any) -> tuple[Path, Any]:
    """The base that is imported from a checkpoint, and a return for it that the owner took in."""
    base = import_model(source, tmp_path / "base", ImportSpec(**spec)).folder
    bundle = packed(base, tmp_path / "bundle", parties)
    more = {"change": lambda name, shipped: shipped + 0.125} if make is full_return else {}
    returned = make(bundle, tmp_path / "return", parties.data_owner, **more)
    return base, intake(returned.folder, parties.owner)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForMultimodalLM

    model, info = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("form", EACH)
def test_the_tower_is_replaced_and_nothing_else(tmp_path: Path, parties: Parties, form: str) -> None:
    source, model = whole_model(tmp_path / "whole", form)
    for name in WHOLE_FILES:
        (source / name).write_text("{}" if name != "chat_template.json" else json.dumps({"chat_template": TEMPLATE}))
    base, accepted = tuned(source, tmp_path, parties)
    merged = plug_in(Base(base), accepted, tmp_path / "merged", PlugInSpec(as_="merged"), parties.owner).folder
    again = PlugInSpec(whole=source, again=True)
    plugged = plug_in(Base(base), accepted, tmp_path / "plugged", again, parties.owner)
    assert verify_plug_in(plugged.folder, parties.owner).manifest.form == "merged"
    found, before = text_logits(loaded(plugged.folder)), text_logits(model)
    assert torch.allclose(found, text_logits(plain(merged)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)
    old, new = load_file(source / WEIGHTS), load_file(plugged.folder / WEIGHTS)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == len(accepted.manifest.tensors)
    assert all("vision" not in name and "visual" not in name and "projector" not in name for name in changed)
    assert (plugged.folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for name in (*WHOLE_FILES, "tokenizer.json"):
        assert (plugged.folder / name).read_bytes() == (source / name).read_bytes()


def test_lora_into_the_whole_checkpoint(tmp_path: Path, parties: Parties) -> None:
    source, _ = whole_model(tmp_path / "whole", "gemma3")
    base, accepted = tuned(source, tmp_path, parties, lora_return)
    plan = plan_plug_in(Base(base), accepted.folder, tmp_path / "plugged", PlugInSpec(whole=source), parties.owner)
    plugged = plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(whole=source), parties.owner)
    merged = plug_in(Base(base), accepted, tmp_path / "merged", PlugInSpec(as_="merged", again=True), parties.owner)
    assert torch.allclose(text_logits(loaded(plugged.folder)), text_logits(plain(merged.folder)), rtol=1e-4, atol=1e-4)
    sizes = {amount.name: amount.bytes for amount in plan.files if not amount.name.startswith("offsite")}
    assert sizes == {name: (plugged.folder / name).stat().st_size for name in sizes}


def test_the_checkpoint_keeps_its_dtype(tmp_path: Path, parties: Parties) -> None:
    """A base in bf16 out of a checkpoint in fp32: what was not tuned keeps every bit."""
    source, _ = whole_model(tmp_path / "whole", "llava")
    base, accepted = tuned(source, tmp_path, parties, dtype="bf16")
    plugged = plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(whole=source), parties.owner)
    old, new = load_file(source / WEIGHTS), load_file(plugged.folder / WEIGHTS)
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == len(accepted.manifest.tensors)


def test_another_checkpoint_is_refused(tmp_path: Path, parties: Parties) -> None:
    source, _ = whole_model(tmp_path / "whole", "llava")
    base, accepted = tuned(source, tmp_path, parties)
    tensors = load_file(source / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    with pytest.raises(IncompatibleError, match="is not the checkpoint that") as caught:
        plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(whole=source), parties.owner)
    assert caught.value.reasons == (f"{name} differs from the base's model.layers.1.mlp.down_proj.weight",)
    assert not (tmp_path / "plugged").exists()


def test_a_base_that_is_no_tower(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base, accepted = tuned(base_of(), tmp_path, parties)
    with pytest.raises(UsageError, match="not the language model of a multi-modal checkpoint"):
        plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(whole=base), parties.owner)


def test_forms_that_are_no_checkpoint(tmp_path: Path, parties: Parties) -> None:
    with pytest.raises(ValidationError, match="whole writes a complete checkpoint"):
        PlugInSpec(whole=tmp_path, as_="adapter")
    source, _ = whole_model(tmp_path / "whole", "llava")
    base, accepted = tuned(source, tmp_path, parties, bottleneck_return)
    with pytest.raises(UsageError, match="cannot be merged"):
        plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(whole=source), parties.owner)
