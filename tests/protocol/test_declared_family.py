"""A family that a bundle declares is data: what it may say, and what is refused before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import edit_json, manifest_of, packed, sign_again
from offsite.errors import VerificationError
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.declared_family import DeclaredFamily, declare_family
from offsite.models.families.transformers_types import causal_class, causal_types, config_keys
from offsite.protocol.artifacts import Bundle
from offsite.protocol.verify import verify_bundle
from tiny import Parties, tiny_parties
from tiny_types import tiny_type_base

Row = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Parties]:
    """A bundle of a type without a row in the table, of which block 2 of 4 was dropped."""
    folder = tmp_path_factory.mktemp("declared")
    parties = tiny_parties(folder)
    base = tiny_type_base(folder / "base", "olmo2", 4)
    return packed(base, folder / "bundle", parties, keep=1), parties


@pytest.fixture
def spoilt(made: tuple[Bundle, Parties], tmp_path: Path) -> Path:
    """A copy of that bundle."""
    return Path(shutil.copytree(made[0].folder, tmp_path / "bundle"))


def refused(folder: Path, made: tuple[Bundle, Parties], **changes: Any) -> str:
    """The reasons for which a bundle is refused that its owner signed again after these changes of its manifest."""
    parties = made[1]
    sign_again(folder, parties.owner.identity(), **changes)
    with pytest.raises(VerificationError) as caught:
        verify_bundle(folder, parties.data_owner)
    return "\n".join(caught.value.reasons)


def test_a_bundle_carries_its_family(made: tuple[Bundle, Parties]) -> None:
    bundle, parties = made
    assert "olmo2" not in ARCHITECTURES
    assert verify_bundle(bundle.folder, parties.data_owner) == bundle
    assert bundle.manifest.requires == ("family",)
    row = bundle.manifest.declared_family
    assert row is not None
    assert row.layout_of == (0, 0, 0)
    family = bundle.manifest.family
    assert (family.class_name, family.blocks, family.mlp_out) == ("Olmo2ForCausalLM", "model.layers", "mlp.down_proj")
    assert declare_family(family, range(3)) == row
    assert DeclaredFamily.model_validate_json(row.model_dump_json()) == row
    assert "declared_family" not in json.loads((bundle.folder / "config.json").read_text())


def _tensor(row: Row, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in row["layouts"][0]["tensors"] if one["name"] == name)
    return found


ROWS: dict[str, tuple[Callable[[Row], Any], str]] = {
    "code beside the fields": (lambda row: row.update(code="import os"), "code"),
    "a class of its own": (lambda row: row.update(class_name="os.system"), "class_name"),
    "blocks at an attribute of a class": (lambda row: row.update(blocks="model.__class__"), "blocks"),
    "blocks at a path of files": (lambda row: row.update(blocks="../../etc"), "blocks"),
    "an empty path": (lambda row: row.update(blocks=""), "blocks"),
    "a pattern for blocks": (lambda row: row.update(blocks="model.*"), "blocks"),
    "a head that was not shipped": (lambda row: row.update(head="secret.weight"), "secret.weight"),
    "a head that is no weight": (lambda row: row.update(head="lm_head"), "no"),
    "bottlenecks at an attribute": (lambda row: row["layouts"][0].update(mlp_out="mlp.__init__"), "mlp_out"),
    "bottlenecks at a layer that is not there": (
        lambda row: row["layouts"][0].update(mlp_out="mlp.secret"),
        "holds no",
    ),
    "a tensor's name that is a path": (lambda row: _tensor(row, "mlp.up_proj.weight").update(name="mlp/up"), "name"),
    "a tensor of a hidden attribute": (
        lambda row: _tensor(row, "mlp.up_proj.weight").update(name="mlp._parameters.weight"),
        "name",
    ),
    "a tensor of another shape": (
        lambda row: _tensor(row, "mlp.up_proj.weight").update(shape=[48, 33]),
        "the config makes it [48, 33]",
    ),
    "a shape of strings": (lambda row: _tensor(row, "mlp.up_proj.weight").update(shape=["48", 32]), "shape"),
    "a tensor that was not shipped": (
        lambda row: row["layouts"][0]["tensors"].append({"name": "mlp.extra.weight", "shape": [1, 1]}),
        "mlp.extra.weight",
    ),
    "a shipped tensor left out": (lambda row: row["layouts"][0]["tensors"].pop(), "unexpected"),
    "a norm as a layer for LoRA": (
        lambda row: _tensor(row, "self_attn.q_norm.weight").update(role="linear"),
        "matrix as its weight",
    ),
    "a role that is none": (lambda row: _tensor(row, "mlp.up_proj.weight").update(role="code"), "role"),
    "a trained tensor as a buffer": (
        lambda row: _tensor(row, "mlp.up_proj.weight").update(role="buffer"),
        "mlp.up_proj",
    ),
    "experts without a number": (
        lambda row: _tensor(row, "mlp.up_proj.weight").update(name="mlp.*.up_proj.weight"),
        "experts",
    ),
    "more experts than there are": (lambda row: row["layouts"][0].update(experts=10**6), "experts"),
    "a kind of block that is not there": (lambda row: row.update(layout_of=[0, 1, 0]), "not declared"),
    "more blocks than the split": (lambda row: row.update(layout_of=[0, 0, 0, 0]), "the split has 3"),
    "a tensor named twice": (
        lambda row: row["layouts"][0]["tensors"].append(_tensor(row, "mlp.up_proj.weight")),
        "declared twice",
    ),
    "a block's tensor outside the blocks": (
        lambda row: row["final"].append({"name": "model.layers.0.mlp.up_proj.weight", "shape": [48, 32]}),
        "outside the blocks",
    ),
    "a count under a key that is not there": (lambda row: row.update(count_keys=["secret"]), "block counts {}"),
    "no count at all": (lambda row: row.update(count_keys=[]), "how many blocks"),
    "a list that the config has not": (lambda row: row.update(per_block=["layer_types"]), "layer_types"),
    "a tied head": (lambda row: row.update(tied=True), "tie_word_embeddings"),
    "weights the other way round": (lambda row: row.update(transposed=True), "LoRA target"),
    "stacks without experts": (
        lambda row: row.update(stacks=[{"parameter": "weight", "maps": ["up_proj"]}]),
        "experts, their path",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_says_more_is_refused(name: str, spoilt: Path, made: tuple[Bundle, Parties]) -> None:
    change, says = ROWS[name]
    row = manifest_of(spoilt)["declared_family"]
    change(row)
    assert says in refused(spoilt, made, declared_family=row)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("llama", "which has a row of its own"),
        ("resnet", "no causal language model of the installed transformers"),
        ("olmo2/../../secret", "no causal language model"),
        ("granite", "names the model 'olmo2'"),
    ],
)
def test_a_type_that_is_no_other_causal_model(
    architecture: str, says: str, spoilt: Path, made: tuple[Bundle, Parties]
) -> None:
    assert says in refused(spoilt, made, architecture=architecture)


def test_a_type_without_a_row_needs_a_declared_one(spoilt: Path, made: tuple[Bundle, Parties]) -> None:
    assert "update offsite" in refused(spoilt, made, declared_family=None, requires=[])


def test_a_declared_family_is_required_of_readers(spoilt: Path, made: tuple[Bundle, Parties]) -> None:
    assert "the manifest requires []" in refused(spoilt, made, requires=[])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "'auto_map' is not permitted"),
        ({"quantization_config": {"quant_method": "x"}}, "'quantization_config' is not permitted"),
        ({"attn_implementation": "evil/kernel"}, "'attn_implementation' is not permitted"),
        ({"_attn_implementation": "evil/kernel"}, "'_attn_implementation' is not permitted"),
        ({"text_config": {"model_type": "llama"}}, "'text_config' is not permitted"),
        ({"a_key_of_no_class": 1}, "'a_key_of_no_class' is not permitted"),
        ({"rope_parameters": {"model_type": "llama"}}, "another model's"),
        ({"rope_parameters": {"rope_type": "a/b"}}, "no plain setting"),
        ({"hidden_act": "evil.module:function"}, "no plain setting"),
        ({"dtype": "load"}, "expected float32, bfloat16 or float16"),
        ({"intermediate_size": 2**40}, "expected at most"),
        ({"max_position_embeddings": 2**30}, "expected at most"),
        ({"num_hidden_layers": 4}, "block counts"),
        ({"architectures": ["LlamaForCausalLM"]}, "names the model"),
        ({"model_type": "llama"}, "names the model 'llama'"),
    ],
)
def test_a_config_that_says_more_is_refused(
    changes: dict[str, Any], says: str, spoilt: Path, made: tuple[Bundle, Parties]
) -> None:
    edit_json(spoilt / "config.json", **changes)
    assert says in refused(spoilt, made)


def test_every_key_that_may_be_exchanged_is_one_of_the_type() -> None:
    """No type lets a key through that fetches code, other files or other weights."""
    foreign = ("auto_map", "quantization_config", "attn_implementation", "kernel_config", "transformers_weights")
    for model_type in causal_types():
        keys = config_keys(model_type)
        assert not keys & set(foreign), model_type
        assert not [key for key in keys if key.startswith("_")], model_type
    assert {"num_hidden_layers", "rope_parameters"} <= config_keys("olmo2")
    assert "rope_parameters" not in config_keys("mamba")
    assert config_keys("no_such_type") == frozenset()
    assert (causal_class("olmo2"), causal_class("resnet")) == ("Olmo2ForCausalLM", None)
