"""docs/models.md is what the code's own table renders, and its worked example works."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from doc_scripts import DOCS, load_script
from offsite.models.families import language_families as families
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.family import Architecture


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("render_models")


def test_the_document_is_what_the_table_renders(script: Any) -> None:
    assert (DOCS / "models.md").read_text(encoding="utf-8") == script.render(), "run `make docs`"


def test_every_family_is_in_it(script: Any) -> None:
    text = script.render()
    for family in ARCHITECTURES.values():
        assert f"| {family.model_type} | {family.class_name} |" in text
        if family.vision is not None:
            assert f"| {family.vision.class_name} |" in text
            continue
        assert f"- **{family.model_type}**: " in text
        assert all(
            f"`{path}`" in text for path in (*family.lora_linears, *family.per_block, *family.listed, *family.refused)
        )


@pytest.mark.parametrize("biased", [True, False])
def test_the_worked_example_is_what_transformers_builds(script: Any, biased: bool) -> None:
    row = eval(script.WORKED_EXAMPLE, vars(families))
    assert isinstance(row, Architecture)
    assert row.model_type not in ARCHITECTURES  # else the example should be another family
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(row.model_type, **sizes, **more, use_bias=biased)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = row.outer_tensors(config.to_dict()) | {
        row.in_block(index, path) for index in range(2) for path in row.block_tensors(config.to_dict(), index)
    }
    assert set(model.state_dict()) - ({row.head} if row.tied(config.to_dict()) else set()) == expected
