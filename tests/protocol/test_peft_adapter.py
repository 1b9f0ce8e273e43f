"""What we write by hand is what PEFT would make of these settings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from artifacts import lora_return, packed
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.peft_adapter import adapter_config, adapter_tensors, lora_pair
from offsite.storage.safetensors_files import read_header
from tiny import FAMILIES, Family, tiny_base, tiny_parties

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Array = Callable[[str], torch.Tensor]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_pefts(tmp_path: Path, family: Family) -> None:
    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_base(tmp_path / "base", family, 4), tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=3)
    lora = returned.manifest.lora
    assert lora is not None
    family = ARCHITECTURES[family]
    config = LoraConfig(
        r=3,
        lora_alpha=8.0,
        target_modules=sorted(lora.targets),
        fan_in_fan_out=family.transposed,
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(bundle.folder, dtype=torch.float32)
    theirs = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(get_peft_model(model, config)).items()}
    ours = {n: e.shape for n, e in adapter_tensors(lora, bundle.manifest.lora_targets).items()}
    assert ours == theirs
    assert set(ours) == set(read_header(returned.folder / "adapter_model.safetensors"))
    assert set(ours) == {name for target in lora.targets for name in lora_pair(target)}


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_config_as_a_plain_lora(tmp_path: Path, family: Family) -> None:
    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_base(tmp_path / "base", family, 3), tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=3)
    read = PeftConfig.from_pretrained(str(returned.folder))
    assert isinstance(read, LoraConfig)
    assert read.target_modules == set(bundle.manifest.lora_targets)
    assert (read.r, read.lora_alpha, read.lora_dropout, read.bias) == (3, 8.0, 0.0, "none")
    assert read.base_model_name_or_path is None
    assert read.init_lora_weights is True
    assert not read.rank_pattern
    assert not read.alpha_pattern
    lora = returned.manifest.lora
    assert lora is not None
    config = adapter_config(lora, ARCHITECTURES[family])
    assert set(config) <= set(read.to_dict())
