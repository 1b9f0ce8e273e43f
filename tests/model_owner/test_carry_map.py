"""The owner's map from a bundle's shapes to the base's: it survives the ledger, and no other bundle's is taken."""

import json

import pytest

from offsite.model_owner.carry_map import CarryMap, KeptFeatures, parse_carry_map, render_carry_map

DIGEST, OTHER = "a" * 64, "b" * 64
MAP = CarryMap.of(
    (0, 3, 3),
    {
        1: {
            "mlp.up_proj": KeptFeatures(outputs=(0, 2, 5)),
            "mlp.down_proj": KeptFeatures(inputs=(0, 2, 5)),
            "self_attn.o_proj": KeptFeatures(inputs=(4, 5)),
        },
        2: {"mlp.up_proj": KeptFeatures(outputs=())},
    },
    {"model.layers.1.mlp.up_proj.bias": b"\x00\x01\xff"},
)


def test_layers_that_are_not_named_keep_everything() -> None:
    assert MAP.features(1, "mlp.up_proj") == KeptFeatures(None, (0, 2, 5))
    assert MAP.features(1, "self_attn.q_proj") == KeptFeatures(None, None)
    assert MAP.features(0, "mlp.up_proj") == KeptFeatures(None, None)
    assert [block.base for block in MAP.blocks] == [0, 3, 3]


def test_the_same_map_comes_back_from_its_json() -> None:
    assert parse_carry_map(render_carry_map(MAP, DIGEST), DIGEST) == MAP


def test_equal_lists_are_stored_once() -> None:
    lists = json.loads(render_carry_map(MAP, DIGEST))["lists"]
    assert sorted(lists) == [[], [0, 2, 5], [4, 5]]


def test_a_map_of_another_bundle_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of bundle bbbbbbbbbbbb"):
        parse_carry_map(render_carry_map(MAP, OTHER), DIGEST)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lists": [[2, 1], [4, 5], []]}, "not in ascending order"),
        ({"lists": [[1, 1], [4, 5], []]}, "not in ascending order"),
        ({"lists": [[-1, 2, 5], [4, 5], []]}, "greater than or equal to 0"),
        ({"lists": []}, "a list of kept features that is not there"),
        ({"blocks": [{"base": True}]}, "valid integer"),
        ({"more": 1}, "Extra inputs"),
        ({"shipped": {"name": "!"}}, "Only base64 data"),
    ],
)
def test_malformed_json(change: dict[str, object], problem: str) -> None:
    content = json.loads(render_carry_map(MAP, DIGEST)) | change
    with pytest.raises(ValueError, match=problem):
        parse_carry_map(json.dumps(content), DIGEST)
