import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from offsite.errors import IncompatibleError
from offsite.models.families.architectures import ARCHITECTURES, architecture_of, config_problems
from offsite.models.mixture import in_files
from tiny import KINDS, tiny_config

LLAMA, GPT2 = ARCHITECTURES["llama"], ARCHITECTURES["gpt2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_row_is_what_transformers_builds(kind: str, tied: bool) -> None:
    """Names of every tensor, in and around the blocks; linear maps, and which way round they store their weights."""
    family = ARCHITECTURES[KINDS[kind]["family"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(kind, 2, tied=tied))
    assert type(model).__name__ == family.class_name
    config = model.config.to_dict()
    tensors = in_files(family, model.state_dict())
    shapes = {family.spellings.get(name, name): tuple(tensor.shape) for name, tensor in tensors.items()}
    if tied:
        del shapes[family.head]
    expected = family.outer_tensors(config) | {
        family.in_block(i, path) for i in range(2) for path in family.block_tensors(config, i)
    }
    assert shapes.keys() == expected
    assert family.block_count(config) == 2
    assert family.tied(config) is tied
    linears = (torch.nn.Linear, Conv1D)
    for index in range(2):
        block = model.get_submodule(family.in_block(index, "").rstrip("."))
        found = {path: module for path, module in block.named_modules() if isinstance(module, linears)}
        weights = {path for path in family.linears if f"{path}.weight" in family.block_tensors(config, index)}
        assert found.keys() == weights if family.experts else found.keys() == weights == family.linears.keys()
        assert found.keys() >= {family.attention_out, *family.lora_linears}
        assert family.mlp_out in (dict(block.named_modules()) if family.experts else found)
        module: Any
        for module in found.values():
            inputs, outputs = (module.nx, module.nf) if family.transposed else (module.in_features, module.out_features)
            assert tuple(module.weight.shape) == ((inputs, outputs) if family.transposed else (outputs, inputs))
    for name, shape in shapes.items():
        assert family.sizes_of(name), name
        assert family.shape_problem(name, shape, config) is None
        assert family.shape_problem(name, (*shape, 1), config)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_a_row_takes_for_granted_is_transformers_default(family: str) -> None:
    """Conditions read a config that may leave keys out; so they must take what transformers would."""
    family, config = ARCHITECTURES[family], AutoConfig.for_model(family).to_dict()
    assert family.tied({}) is family.tied(config)
    assert {key: config[key] for key in family.defaults} == dict(family.defaults)
    conditions = [
        *family.biases,
        *family.only_if.values(),
        *family.mlp_norms.values(),
        *family.attention_norms.values(),
    ]
    for key in {word for condition in conditions for word in re.findall(r"[A-Za-z_]+", str(condition))} - {
        "or",
        "has_experts",
        *family.follows,  # which no config may leave out
    }:
        assert key in family.defaults or not config[key] or key == "word_embed_proj_dim", key


@pytest.mark.parametrize("kind", KINDS)
def test_config_keys_that_travel_make_the_same_config(kind: str) -> None:
    family = ARCHITECTURES[KINDS[kind]["family"]]
    whole = tiny_config(kind, 4, architectures=[family.class_name]).to_dict()
    kept = {key: value for key, value in whole.items() if key in family.config_keys}
    assert config_problems(kept, family) == []
    again = AutoConfig.for_model(**kept).to_dict()
    left = {"transformers_version", "_name_or_path", "sliding_window_pattern", "_sliding_window_pattern"}
    assert {key for key in whole if whole[key] != again.get(key)} <= left


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ARCHITECTURES[KINDS[kind]["family"]].per_block])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 13])
def test_lists_that_a_config_leaves_out_are_those_that_transformers_derives(kind: str, blocks: int) -> None:
    family = ARCHITECTURES[KINDS[kind]["family"]]
    config = tiny_config(kind, blocks)
    without = {key: value for key, value in config.to_dict().items() if key not in family.per_block}
    without |= {"sliding_window_pattern": 3} if "_sliding_window_pattern" in without else {}
    whole = family.subset(without, range(blocks))
    for key in family.per_block:
        assert whole[key] == getattr(config, key)
    kept = [index for index in range(blocks) if index % 3 != 1]
    cut = family.subset(config.to_dict(), kept)
    assert cut["layer_types"] == family.subset(without, kept)["layer_types"] == [config.layer_types[i] for i in kept]
    assert cut[family.count_keys[0]] == len(kept)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize("windows", [{}, {"use_sliding_window": True, "sliding_window": 4}])
def test_a_cut_config_does_not_tell_how_deep_the_base_is(family: str, windows: dict[str, Any]) -> None:
    family = ARCHITECTURES[family]
    one, other = (
        family.subset({"num_hidden_layers": blocks, "max_window_layers": blocks - 2, **windows}, [0, 1, 2])
        for blocks in (9, 14)
    )
    assert one == other
    assert one["max_window_layers"] <= 3
    del one["layer_types"]
    assert family.subset(one, range(3)) == other  # who derives the list comes to the same


@pytest.mark.parametrize("period", [0, -1, "3", None])
def test_a_period_of_windows_that_is_none(period: object) -> None:
    config = {"num_hidden_layers": 4, "sliding_window_pattern": period}
    with pytest.raises(IncompatibleError, match="which blocks have sliding windows"):
        ARCHITECTURES["gemma3_text"].subset(config, [0])


def test_a_list_that_is_not_as_long_as_there_are_blocks() -> None:
    family = ARCHITECTURES["qwen2"]
    for broken in (["full_attention"], "full_attention", 3):
        with pytest.raises(IncompatibleError, match="one entry for each of the 2 blocks"):
            family.subset({"num_hidden_layers": 2, "layer_types": broken}, [0])


@pytest.mark.parametrize(
    ("condition", "config", "holds"),
    [
        ("", {}, True),
        ("a", {}, False),
        ("a", {"a": 1}, True),
        ("!a", {"a": 0}, True),
        ("enable_bias", {}, True),
        ("!enable_bias", {"enable_bias": False}, True),
        ("a=2", {"a": 2}, True),
        ("a=2", {"a": "2"}, False),
        ("a!=b", {"a": 1, "b": 2}, True),
        ("a!=b", {"a": 1, "b": 1}, False),
        ("a!=b", {"a": None, "b": 1}, False),
        ("a b", {"a": 1}, False),
        ("a b or !c", {"a": 1}, True),
        ("a b or c", {"a": 1, "b": {}}, False),
    ],
)
def test_conditions(condition: str, config: dict[str, Any], holds: bool) -> None:
    assert ARCHITECTURES["opt"].holds(condition, config) is holds


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
    ("family", "stored", "name"),
    [
        ("gpt2", "wte.weight", "transformer.wte.weight"),
        ("gpt2", "transformer.wte.weight", "transformer.wte.weight"),
        ("gpt2", "h.3.ln_1.bias", "transformer.h.3.ln_1.bias"),
        ("gpt2", "lm_head.weight", "lm_head.weight"),
        ("gpt2", "h.3.attn.bias", None),
        ("gpt2", "transformer.h.11.attn.masked_bias", None),
        ("gpt2", "h.3.attn.c_attn.bias", "transformer.h.3.attn.c_attn.bias"),
        ("llama", "model.layers.3.self_attn.rotary_emb.inv_freq", None),
        ("llama", "layers.3.self_attn.rotary_emb.inv_freq", None),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "norm.weight", "model.norm.weight"),
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "vision.weight", "vision.weight"),
        ("opt", "decoder.layers.0.fc1.bias", "model.decoder.layers.0.fc1.bias"),
        ("opt", "decoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
        ("bloom", "word_embeddings.weight", "transformer.word_embeddings.weight"),
        ("bloom", "h.1.self_attention.dense.bias", "transformer.h.1.self_attention.dense.bias"),
        ("gpt_neox", "embed_out.weight", "embed_out.weight"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        ("gpt_neox", "layers.1.attention.masked_bias", None),
        ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq", None),
        ("gpt_neox", "gpt_neox.layers.1.attention.dense.bias", "gpt_neox.layers.1.attention.dense.bias"),
        ("gptj", "transformer.h.0.attn.bias", None),
        ("gptj", "lm_head.bias", "lm_head.bias"),
        ("phi", "lm_head.bias", "lm_head.bias"),
    ],
)
def test_todays_names(family: str, stored: str, name: str | None) -> None:
    assert ARCHITECTURES[family].name_of(stored) == name


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


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, {"model_type": ["llama"]}, {"model_type": None}])
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
    """A family is a row, never a branch: no other file names one, but tables of what GGUF files call theirs."""
    source = Path(__file__).parents[2] / "src" / "offsite"
    for file in source.rglob("*.py"):
        if file.name in ("language_families.py", "pretrained.py", "gguf.py", "gguf_settings.py"):
            continue
        text = file.read_text(encoding="utf-8")
        assert '"gpt2"' not in text, file
        assert '== "llama"' not in text, file
