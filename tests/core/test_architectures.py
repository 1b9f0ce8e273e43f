from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.core.architectures import ARCHITECTURES, architecture_of, config_problems
from offsite.errors import IncompatibleError

LLAMA, GPT2 = ARCHITECTURES["llama"], ARCHITECTURES["gpt2"]
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 30},
    "gpt2": {"n_embd": 16, "n_head": 2, "vocab_size": 30, "n_positions": 16},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_row_is_what_transformers_builds(family: str, tied: bool, biased: bool) -> None:
    """Names of every tensor, in and around the blocks; linear maps, and which way round they store their weights."""
    row = ARCHITECTURES[family]
    extra = {"attention_bias": biased, "mlp_bias": biased} if family == "llama" else {}
    settings = SMALL[family] | extra | {row.count_keys[0]: 2, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    assert type(model).__name__ == row.class_name
    config = model.config.to_dict()
    names = set(model.state_dict()) - ({row.head} if tied else set())
    expected = row.outer_tensors(config) | {
        row.in_block(i, path) for i in range(2) for path in row.block_tensors(config)
    }
    assert names == expected
    assert row.block_count(config) == 2
    assert row.tied(config) is tied
    for path in row.linears:
        module: Any = model.get_submodule(row.in_block(1, path))
        inputs, outputs = (module.nx, module.nf) if row.transposed else (module.in_features, module.out_features)
        assert tuple(module.weight.shape) == ((inputs, outputs) if row.transposed else (outputs, inputs))
    assert {row.attention_out, row.mlp_out} <= set(row.linears)
    for name, tensor in model.state_dict().items():
        assert row.shape_problem(name, tuple(tensor.shape), config) is None
        assert row.shape_problem(name, (*tensor.shape, 1), config)
        place = row.block_of(name)
        assert (place[1] if place else name) in row.shapes


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_config_keys_that_travel_make_the_same_config(family: str) -> None:
    row = ARCHITECTURES[family]
    whole = AutoConfig.for_model(family, **SMALL[family], architectures=[row.class_name]).to_dict()
    kept = {key: value for key, value in whole.items() if key in row.config_keys}
    assert config_problems(kept, row) == []
    again = AutoConfig.for_model(**kept).to_dict()
    assert {key for key in whole if whole[key] != again.get(key)} <= {"transformers_version", "_name_or_path"}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.0.mlp.up_proj.weight", (0, "mlp.up_proj.weight")),
        ("model.layers.12345.x", (12345, "x")),
        ("model.layers.01.x", None),
        ("model.layers.-1.x", None),
        ("model.layers.123456.x", None),
        ("model.layers.0", None),
        ("model.layers.0.", None),
        ("xmodel.layers.0.x", None),
        ("model.layersX0.x", None),
        ("model.layers.٣.x", None),
        ("model.norm.weight", None),
    ],
)
def test_block_of(name: str, place: tuple[int, str] | None) -> None:
    assert LLAMA.block_of(name) == place
    if place:
        assert LLAMA.in_block(*place) == name


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("wte.weight", "transformer.wte.weight"),
        ("transformer.wte.weight", "transformer.wte.weight"),
        ("h.3.ln_1.bias", "transformer.h.3.ln_1.bias"),
        ("lm_head.weight", "lm_head.weight"),
        ("h.3.attn.bias", None),
        ("transformer.h.11.attn.masked_bias", None),
        ("h.3.attn.c_attn.bias", "transformer.h.3.attn.c_attn.bias"),
    ],
)
def test_todays_names_of_gpt2(stored: str, name: str | None) -> None:
    assert GPT2.name_of(stored) == name


def test_todays_names_of_llama() -> None:
    assert LLAMA.name_of("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    assert LLAMA.name_of("model.norm.weight") == "model.norm.weight"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_layer": 0},
        {"n_layer": -1},
        {"n_layer": True},
        {"n_layer": 2.0},
        {"n_layer": "2"},
        {"n_layer": [2]},
        {"n_layer": None},
        {"n_layer": 2, "num_hidden_layers": 3},
        {"n_layer": 1, "num_hidden_layers": True},
        {"n_layer": 2, "num_hidden_layers": {}},
    ],
)
def test_block_count_that_is_none(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="how many blocks") as caught:
        GPT2.block_count(config)
    assert caught.value.exit_code == 4


def test_block_count() -> None:
    assert GPT2.block_count({"n_layer": 3}) == GPT2.block_count({"n_layer": 3, "num_hidden_layers": 3}) == 3
    assert GPT2.block_count({"num_hidden_layers": 3}) == 3


def test_tied() -> None:
    assert GPT2.tied({})
    assert not LLAMA.tied({})
    assert LLAMA.tied({"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("shape", "config", "says"),
    [
        ([4, 8], {"intermediate_size": 4, "hidden_size": 8}, None),
        ([4, 8], {}, None),
        ([4, 8], {"intermediate_size": None, "hidden_size": "8"}, None),
        ([4, 8], {"intermediate_size": 5}, "[5, any]"),
        ([4, 8], {"intermediate_size": 8, "hidden_size": 4}, "[8, 4]"),
        ([4], {}, "[any, any]"),
    ],
)
def test_shapes(shape: list[int], config: dict[str, Any], says: str | None) -> None:
    problem = LLAMA.shape_problem("model.layers.3.mlp.up_proj.weight", shape, config)
    assert says in problem if says and problem else problem is None and says is None


@pytest.mark.parametrize("config", [{}, {"model_type": "bloom"}, {"model_type": ["llama"]}, {"model_type": None}])
def test_unknown_family(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="are not supported"):
        architecture_of(config)


@pytest.mark.parametrize("value", [True, 1, "yes", [0]])
def test_switch_that_makes_blocks_depend_on_their_place(value: object) -> None:
    """Transformers asks whether it is true, so anything that is true is refused."""
    config = {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": value}
    assert GPT2.set_switches(config)
    with pytest.raises(IncompatibleError, match="by their position"):
        architecture_of(config)


@pytest.mark.parametrize("value", [False, None, 0])
def test_switch_that_is_off(value: object) -> None:
    assert architecture_of({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": value}) is GPT2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {}),
        ("_name_or_path", ""),
        ("_attn_implementation", "sdpa"),
        ("hidden_act", "a/b"),
        ("hidden_act", "a b"),
        ("hidden_act", "x" * 65),
        ("hidden_act", "é"),
        ("rope_scaling", {"a/b": 1}),
        ("rope_scaling", {"a": {"b": {"c": {}}}}),
        ("rope_scaling", {str(i): 1 for i in range(65)}),
        ("eos_token_id", ["a/b"]),
        ("eos_token_id", [0] * 4097),
    ],
)
def test_what_may_not_travel(key: str, value: object) -> None:
    assert len(config_problems({key: value}, LLAMA)) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_pytorch_tanh"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "nested": {"list": [1, 2]}}),
        ("eos_token_id", [1, 2, 3]),
        ("pad_token_id", None),
        ("tie_word_embeddings", True),
    ],
)
def test_what_may(key: str, value: object) -> None:
    assert config_problems({key: value}, LLAMA) == []


def test_no_branch_on_a_family_outside_the_table() -> None:
    """A family is a row, never a branch: no other file names one."""
    source = Path(__file__).parents[2] / "src" / "offsite"
    for file in source.rglob("*.py"):
        if file.name in ("architectures.py", "pretrained.py"):
            continue
        text = file.read_text(encoding="utf-8")
        assert '"gpt2"' not in text, file
        assert '== "llama"' not in text, file
