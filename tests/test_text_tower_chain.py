"""A multi-modal checkpoint whose language model has no row in the table: read off, proved, tuned and put back."""

from pathlib import Path

import pytest
import torch

import offsite
from model_owner.importing.test_text_tower import text_logits, whole_model
from model_owner.plugging_in.test_whole_checkpoint import loaded
from model_owner.test_pack import plain
from offsite import PackSpec, PlugInSpec, TuneSpec
from offsite.config import Method
from offsite.model_owner.importing.import_model import import_model
from tiny import Parties, tiny_rows

MORE = pytest.mark.every_form


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=MORE)])
@pytest.mark.parametrize("form", ["llava, olmo2", pytest.param("llava_next, granite", marks=MORE)])
def test_a_derived_tower_is_tuned(tmp_path: Path, parties: Parties, form: str, method: Method) -> None:
    source, model = whole_model(tmp_path / "whole", form)
    base = import_model(source, tmp_path / "base")
    settings = PackSpec(bottom=1, top=1, keep=1, dtype="fp32", max_rank=4)
    bundle = offsite.pack(base, tmp_path / "bundle", "hospital", settings, parties.owner)
    assert bundle.manifest.declared_family is not None
    assert method in bundle.manifest.methods
    spec = TuneSpec(method=method, rank=4, lr=3e-3, max_steps=3, batch_size=4, compute="fp32", device="cpu", threads=1)
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    returned = offsite.tune(bundle, rows, tmp_path / "return", spec, parties.data_owner)
    taken = offsite.intake(returned.folder, parties.owner)
    merged = offsite.plug_in(base, taken, tmp_path / "merged", PlugInSpec(as_="merged"), parties.owner)
    whole = offsite.plug_in(base, taken, tmp_path / "plugged", PlugInSpec(whole=source, again=True), parties.owner)
    found, expected = text_logits(loaded(whole.folder)), text_logits(plain(merged.folder))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, text_logits(model), rtol=1e-4, atol=1e-4)
