"""What a declaration of narrower blocks may say."""

from typing import Any

import pytest

from offsite.models.block_widths import Widths
from offsite.models.modules.declared import Declared

BASE = Widths(hidden=32, heads=4, groups=2, head_size=8, neurons=48, grouped=True)
MIXTURE = Widths(hidden=32, heads=4, groups=2, head_size=8, neurons=0, grouped=True, experts=8, chosen=2)
DENSE = Widths(hidden=32, heads=4, groups=2, head_size=8, neurons=0, grouped=True)  # a block of a mixture without any


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heads": [4, 4, 4]}, "3 entries in heads for 2 blocks"),
        ({"neurons": [48]}, "1 entries in neurons for 2 blocks"),
        ({"neurons": [48, 0]}, "greater than or equal to 1"),
        ({"neurons": [48, 40], "mlp_width": 40}, "two ways to say the same"),
        ({"heads": [4, 2], "share": [0, 0]}, "no widths of their own"),
        ({"experts": [4]}, "1 entries in experts for 2 blocks"),
        ({"experts": [4, 1025]}, "less than or equal to 1024"),
        ({"experts": [4, 2], "share": [0, 0]}, "no widths of their own"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Declared.model_validate({"first": 1, "blocks": 2, **fields})


def test_widths_are_those_of_each_block() -> None:
    declared = Declared.model_validate({"first": 1, "blocks": 2, "heads": [2, 4], "neurons": [48, 20]})
    assert declared.features == ("heads", "neurons")
    assert declared.widths(BASE, 0) == Widths(32, 2, 1, 8, 48, grouped=True)
    assert declared.widths(BASE, 1) == Widths(32, 4, 2, 8, 20, grouped=True)


@pytest.mark.parametrize("fields", [{"heads": [3]}, {"heads": [6]}, {"neurons": [49]}])
def test_widths_that_no_block_of_the_family_can_have_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heads go by 2"):
        Declared.model_validate({"first": 1, "blocks": 1, **fields}).widths(BASE, 0)


def test_experts_are_those_of_each_block() -> None:
    declared = Declared.model_validate({"first": 1, "blocks": 2, "experts": [3, 0]})
    assert declared.features == ("experts",)
    assert declared.widths(MIXTURE, 0) == MIXTURE.narrowed(2, 0, 3)
    assert declared.widths(DENSE, 1) == DENSE
    assert "experts" not in Declared.model_validate({"first": 1, "blocks": 1, "heads": [2]}).model_dump(mode="json")


@pytest.mark.parametrize(("base", "experts"), [(MIXTURE, 0), (MIXTURE, 1), (MIXTURE, 9), (DENSE, 2), (BASE, 1)])
def test_experts_that_no_block_of_the_family_can_have_are_refused(base: Widths, experts: int) -> None:
    declared = Declared.model_validate({"first": 1, "blocks": 1, "experts": [experts]})
    with pytest.raises(ValueError, match=f"has {experts} experts, expected {base.chosen}.*to {base.experts}"):
        declared.widths(base, 0)
