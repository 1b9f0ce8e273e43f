"""A family that is read off a model is the one that the table says, and its config is cut with the blocks."""

from pathlib import Path
from typing import Any

import pytest

from artifacts import copied_folder, edit_json
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.derive_family import derive_family
from offsite.protocol.artifacts import Base
from tiny import KINDS, MakeBase, each_form, tiny_config
from tiny_types import shrunk


@pytest.mark.parametrize("kind", each_form(KINDS))
def test_what_is_read_off_a_model_is_what_the_table_says(kind: str) -> None:
    row, settings = ARCHITECTURES[KINDS[kind]["family"]], tiny_config(kind, 3).to_dict()
    family = derive_family(settings).family
    assert (family.model_type, family.class_name, family.blocks) == (row.model_type, row.class_name, row.blocks)
    assert row.spellings.get(family.head, family.head) == row.head
    assert family.tied_by_default is row.tied(settings)
    assert {*family.embeddings, *family.final} == row.outer_tensors(settings | {"tie_word_embeddings": True})
    assert family.transposed is row.transposed
    assert set(family.count_keys) <= set(row.count_keys)
    for index in range(3):
        layout, expected = family.layout(index), row.block_tensors(settings, index)
        if row.experts is None:
            assert layout.tensors() == expected
            assert set(layout.linears) <= set(row.lora_linears)
            assert (layout.attention_out, layout.mlp_out) == (row.attention_out, row.mlp_out)
        else:
            assert set(row.adapted) <= set(layout.linears)
            assert layout.attention_out == row.attention_out


CUTS: dict[str, tuple[str, dict[str, Any], list[int], dict[str, Any]]] = {
    "a number of blocks": ("olmo2", {}, [0, 3], {"num_hidden_layers": 2}),
    "a list with an entry per block": (
        "cohere2",
        {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
        [1, 2, 4],
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "a number of first blocks": ("deepseek_v3", {"first_k_dense_replace": 2}, [0, 3, 4], {"first_k_dense_replace": 1}),
    "a list of blocks": ("bamba", {"attn_layer_indices": [1, 3]}, [0, 1, 4], {"attn_layer_indices": [1]}),
    "runs of kinds": ("gpt_neo", {}, [1, 4], {"attention_types": [[["local", "global"], 1]]}),
    "a pattern that repeats": (
        "recurrent_gemma",
        {"block_types": ["recurrent", "recurrent", "attention"]},
        [0, 2, 3],
        {"block_types": ["recurrent", "attention", "recurrent"]},
    ),
    "a list that is no list of blocks": ("falcon_h1", {}, [0, 1], {"ssm_multipliers": None}),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_config_is_cut_with_the_blocks(name: str) -> None:
    model_type, settings, kept, expected = CUTS[name]
    derived = derive_family(shrunk(model_type, 5, **settings))
    cut = derived.family.subset(derived.config, kept)
    for key, value in expected.items():
        assert cut[key] == (derived.config[key] if value is None else value), key
    again = derive_family(cut).family
    assert [again.layout(place) for place in range(len(kept))] == [derived.family.layout(index) for index in kept]


def test_blocks_that_no_config_places_so_are_refused() -> None:
    """The differences of Differential Llama's blocks go by their place in the model."""
    derived = derive_family(shrunk("diffllama", 4))
    assert derived.family.subset(derived.config, [0, 1])["num_hidden_layers"] == 2
    with pytest.raises(IncompatibleError, match="no config gives the blocks 0, 2, 3") as caught:
        derived.family.subset(derived.config, [0, 2, 3])
    assert any("lambda_init" in reason for reason in caught.value.reasons)
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_type": "no_such_type"}, "has no causal language model of that type"),
        ({"model_type": "convnext"}, "has no causal language model of that type"),
        ({"model_type": None}, "has no causal language model of that type"),
        ({"model_type": "olmo2", "hidden_size": 30, "num_attention_heads": "four"}, "makes no causal language model"),
        ({"model_type": "gemma3"}, "a language model within another one"),
        ({"model_type": "qwen3_5"}, "a language model within another one"),
    ],
)
def test_what_cannot_be_read_off_says_why(
    base_of: MakeBase, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    base = copied_folder(base_of(), tmp_path / "base")
    edit_json(base / "config.json", **settings)
    with pytest.raises(IncompatibleError, match="are not supported") as caught:
        open_base(Base(base))
    assert says in str(caught.value)
    assert "docs/models.md" in str(caught.value) or "offsite import" in str(caught.value)
