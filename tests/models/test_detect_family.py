"""A family without a row: the row that the error prints is one that works."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from artifacts import copied_folder, edit_json, packed
from model_owner.test_pack import bits, cut, logits, plain
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.models import families
from offsite.models.architectures import ARCHITECTURES
from offsite.models.detect_family import detect, render
from offsite.models.family import Architecture
from offsite.protocol.artifacts import Base
from offsite.protocol.verify import verify_bundle
from tiny import KINDS, MakeBase, Parties, each_form, tiny_config, tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


# Of stacked experts no row can be read off a model.
@pytest.mark.parametrize("kind", each_form(kind for kind in KINDS if not ARCHITECTURES[KINDS[kind]["family"]].experts))
def test_what_is_detected_is_what_the_table_says(kind: str) -> None:
    family, config = ARCHITECTURES[KINDS[kind]["family"]], tiny_config(kind, 3)
    found, settings = detect(config.to_dict()), config.to_dict()
    assert (found.model_type, found.class_name, found.blocks) == (family.model_type, family.class_name, family.blocks)
    assert family.spellings.get(found.head, found.head) == family.head
    assert found.tied is family.tied_by_default
    assert set(found.embeddings) | set(found.final) == family.outer_tensors(settings | {"tie_word_embeddings": True})
    assert set(found.linears) == set(family.linears)
    assert (found.attention_out, found.mlp_out) == (family.attention_out, family.mlp_out)
    assert found.transposed is family.transposed
    names = {*found.norms, *(f"{n}.weight" for n in found.linears), *(f"{n}.bias" for n in found.biased)}
    assert names == family.block_tensors(settings, 0)
    assert set(found.count_keys) <= set(family.count_keys)
    assert found.per_block == sorted(family.per_block)


def stranger(folder: Path, model_type: str, **settings: Any) -> Path:
    """A tiny base of a family that has no row."""
    tiny_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=320, **SIZES | settings))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["starcoder2", "olmo2", "granite"])
def test_the_row_that_the_error_prints_works(
    parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    assert model_type not in ARCHITECTURES
    base = stranger(tmp_path / "base", model_type)
    with pytest.raises(IncompatibleError, match=f"'{model_type}' are not supported") as caught:
        packed(base, tmp_path / "bundle", parties)
    assert not (tmp_path / "bundle").exists()
    assert "docs/models.md" in str(caught.value)
    printed = next(reason for reason in caught.value.reasons if "Architecture(" in reason)
    row = eval(printed.partition("\n")[2], vars(families))
    assert isinstance(row, Architecture)
    monkeypatch.setitem(ARCHITECTURES, model_type, row)  # type: ignore[arg-type]
    whole = packed(base, tmp_path / "whole", parties, keep=3)
    assert bits(whole.folder) == bits(base)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    assert verify_bundle(bundle.folder, parties.data_owner) == bundle
    torch.testing.assert_close(logits(plain(bundle.folder)), logits(cut(plain(base), [0, 1, 4])))
    monkeypatch.undo()
    with pytest.raises(Exception, match="update offsite"):  # the other party does not know the family
        verify_bundle(bundle.folder, parties.data_owner)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "no_such_type"}, "makes no causal language model"),
        ({"model_type": "convnext"}, "makes no causal language model"),
        (
            {"model_type": "olmoe", **SIZES, "num_experts": 2},
            "stacked experts and convolutions are not supported",
        ),
        ({"model_type": "falcon_mamba", **SIZES}, "such as mixer.conv1d.weight"),
        ({"model_type": "deepseek_v3", **SIZES, "first_k_dense_replace": 1}, "blocks are not alike"),
        ({"model_type": "bart", **SIZES}, "0 lists as long as its block count"),
        ({"model_type": "fuyu"}, "its parts could not be told"),
        ({}, "makes no causal language model"),
    ],
)
def test_what_cannot_be_told_says_why(base_of: MakeBase, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    base = copied_folder(base_of(), tmp_path / "base")
    edit_json(base / "config.json", **({"model_type": None} | settings))
    with pytest.raises(IncompatibleError, match=says) as caught:
        open_base(Base(base))
    assert "Architecture(" not in str(caught.value)
    assert "supported: beit" in str(caught.value)


def test_a_row_is_rendered_without_loose_ends() -> None:
    text = render(detect(tiny_config("qwen2", 3).to_dict()))
    assert "# layer_types has an entry per block" in text
    assert '"self_attn.q_proj": "' in text
