"""Widths of blocks: the arithmetic that is left is the share that was asked for."""

from typing import Any

import pytest

from offsite.config import PackSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes, even_widths
from offsite.models.block_widths import multiply_adds, narrowed_shapes
from offsite.protocol.artifacts import Base
from tiny import KINDS, MakeBase, each_form

DENSE = [kind for kind, form in KINDS.items() if "mix" not in form["family"] and "moe" not in form["family"]]


def spec(**settings: Any) -> PackSpec:
    return PackSpec.model_validate(settings)


@pytest.mark.parametrize("share", [0.55, 0.75, 0.9])
@pytest.mark.parametrize("kind", each_form(DENSE))
def test_the_arithmetic_is_the_share_that_was_asked_for(base_of: MakeBase, kind: str, share: float) -> None:
    model = open_base(Base(base_of(blocks=3, **KINDS[kind])))
    shapes, base = block_shapes(model, 1), base_widths(model, 1)
    (widths,) = even_widths(model, (1,), spec(narrow=share))
    whole, left, without_one = (
        multiply_adds(model.family, narrowed_shapes(model.family, shapes, base, base.narrowed(units, neurons)))
        for units, neurons in (
            (base.units, base.neurons), (widths.units, widths.neurons), (widths.units, widths.neurons - 1)
        )
    )  # fmt: skip
    assert share * whole - (left - without_one) < left <= share * whole


def test_shares_of_heads_and_neurons(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("llama", 3, kv_heads=4)))
    (widths,) = even_widths(model, (1,), spec(narrow_heads=0.5, narrow_neurons=0.25))
    assert (widths.heads, widths.groups, widths.neurons) == (2, 2, 12)
    (widths,) = even_widths(model, (1,), spec(narrow_neurons=0.5))
    assert (widths.heads, widths.neurons) == (4, 24)


def test_one_key_value_head_stays_and_query_heads_go(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("llama", 3, kv_heads=1)))
    (widths,) = even_widths(model, (1,), spec(narrow_heads=0.75))
    assert (widths.heads, widths.groups) == (3, 1)


@pytest.mark.parametrize("settings", [{"narrow": 0.01}, {"narrow": 0.02, "bottom": 1}])
def test_a_share_that_no_block_can_reach_is_refused(base_of: MakeBase, settings: dict[str, Any]) -> None:
    model = open_base(Base(base_of("llama", 3)))
    with pytest.raises(UsageError, match="less than a block can be narrowed to"):
        even_widths(model, (1,), spec(**settings))


def test_heads_with_biases_for_positions_stay(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("bloom", 3)))
    with pytest.raises(IncompatibleError, match="heads of this bloom model cannot be removed"):
        even_widths(model, (1,), spec(narrow_heads=0.5))
    (widths,) = even_widths(model, (1,), spec(narrow=0.75))
    assert widths.heads == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"narrow": 0.5, "narrow_heads": 0.5},
        {"narrow": 0.5, "mlp_width": 0.5},
        {"narrow": 0.5, "heal": "share", "keep": 2},
        {"narrow": 0.0},
        {"narrow_by": "chance"},
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="narrow"):
        spec(**settings)
