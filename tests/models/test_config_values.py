"""Values of configs: every key of every family has a kind and a limit."""

from typing import Any

import pytest

from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.config_values import CHECKED_KEYS, LARGEST, value_problems


def test_every_key_of_the_table_is_checked() -> None:
    assert set().union(*(family.config_keys for family in ARCHITECTURES.values())) <= CHECKED_KEYS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", True),
        ("num_attention_heads", "4"),
        ("hidden_size", 32.0),
        ("hidden_size", 0),
        ("vocab_size", 2**40),
        ("max_position_embeddings", LARGEST + 1),
        ("max_position_embeddings", [1]),
        ("attention_dropout", 1.0),
        ("attention_dropout", -0.1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", 1e300),
        ("rope_theta", -1.0),
        ("hidden_act", 3),
        ("hidden_act", {"a": 1}),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", []),
        ("eos_token_id", [1.5]),
        ("torch_dtype", "float8"),
        ("rope_parameters", [1]),
        ("rope_parameters", {"factor": 0}),
        ("rope_parameters", {"full": {"rope_theta": "x"}}),
        ("rope_parameters", {"a": {"b": {"c": 1}}}),
        ("rope_scaling", {"long_factor": [1.0, -1.0]}),
    ],
)
def test_values_of_another_kind_or_too_large(key: str, value: Any) -> None:
    assert len(list(value_problems({key: value}, ARCHITECTURES["llama"]))) == 1


@pytest.mark.parametrize(
    "config",
    [
        {
            "sliding_window": None,
            "pad_token_id": -1,
            "eos_token_id": [1, 2],
            "rope_theta": 10_000,
            "rms_norm_eps": 1e-6,
        },
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "other": None}},
        {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
        {"max_position_embeddings": 1_048_576},
    ],
)
def test_values_of_published_models(config: dict[str, Any]) -> None:
    assert list(value_problems(config, ARCHITECTURES["llama"])) == []


def test_a_family_that_computes_a_table_of_positions_has_a_lower_limit() -> None:
    assert list(value_problems({"n_positions": 2**20}, ARCHITECTURES["gpt2"])) == []  # a tensor confirms it there
    assert len(list(value_problems({"n_positions": 2**20}, ARCHITECTURES["gptj"]))) == 1
