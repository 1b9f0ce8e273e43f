"""Packing without healing, and plugging in, need no memory for the model: it is larger than their peak here."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.hollow_base import SIZES
from benchmarks.large_base import write_base

from artifacts import lora_return, packed
from offsite.config import PackSpec, PlugInSpec
from offsite.kernels.peak_memory import peak_memory
from offsite.model_owner.intake import intake
from offsite.model_owner.pack import pack
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.verify import verify_bundle
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import MakeBase, Parties

MOST = 56 * 2**20
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_hidden_layers": 5, "vocab_size": 4096,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_packing_and_plugging_in_stream(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(base_of("llama", 3), tmp_path / "tiny", parties)  # imports what packing needs
    monkeypatch.setitem(SIZES, "test", SHAPE)
    write_base(tmp_path / "base", "test", None)
    base, device = Base(tmp_path / "base"), torch.device("cpu")
    assert open_checkpoint(base.folder).size > 3 * MOST
    spec = PackSpec(bottom=1, top=1, keep=3, heal="none")

    def packing() -> None:
        pack(base, tmp_path / "bundle", "hospital", spec, parties.owner)

    before, peak = peak_memory(packing, device)
    assert peak - before < MOST
    bundle = verify_bundle(tmp_path / "bundle", parties.data_owner)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)

    def plugging() -> None:
        accepted = intake(returned.folder, parties.owner)
        plug_in(base, accepted, tmp_path / "plugged", PlugInSpec(as_="merged"), parties.owner)

    before, peak = peak_memory(plugging, device)
    assert peak - before < MOST
