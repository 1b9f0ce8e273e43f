import json
from pathlib import Path

import pytest

from offsite.data.pictures.picture_files import load_processor
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.tokenizers import load_tokenizer
from offsite.protocol.artifacts import Base
from offsite.study.demos.tiny_base import tiny_base as made
from tiny import KINDS, tiny_base


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_family_in_small(architecture: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base", architecture, 3)
    model = open_base(base)
    assert (model.family.model_type, model.blocks) == (architecture, 3)
    assert sum(tensor.size for tensor in model.tensors.values()) < 2**21


@pytest.mark.parametrize(
    "kind", ["opt, projections, norms behind", "gemma3", "llama untied", "gpt_neox, sequential, no biases"]
)
def test_a_base_is_followed_in_all_but_its_size(kind: str, tmp_path: Path) -> None:
    settings = dict(KINDS[kind])
    like = tiny_base(tmp_path / "like", settings.pop("family"), blocks=7, **settings)
    original = open_base(Base(like))
    small = open_base(made(tmp_path / "base", original.family.model_type, like=like))
    assert small.blocks == 7
    family = original.family
    assert set(small.block(0)) == set(original.block(0))
    assert family.tied(small.config) == family.tied(original.config)


def test_its_tokenizer_knows_every_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made(tmp_path / "base", "llama", 2).folder)
    text = "Naïve 日本 \n\t{}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="no model of type 'gpt5'"):
        made(tmp_path / "base", "gpt5", 2)


def test_an_encoder_has_a_processor_of_its_size(tmp_path: Path) -> None:
    assert load_processor(made(tmp_path / "base", "clip_vision_model", 2).folder).side == (16, 16)
