"""Returned values of narrower layers land in the kept rows and columns of the base, and nowhere else."""

import dataclasses
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from artifacts import lora_return, packed
from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.carry_map import CarryMap, KeptFeatures
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in.carry import Spread, carry_axis, carry_of, require_fitting_map
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from tiny import MakeBase, Parties


def test_values_land_at_the_kept_places() -> None:
    values = np.array([[1, 2], [3, 4]], np.float32)
    assert carry_axis(values, (1, 3), 4, axis=0).tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert carry_axis(values, (0, 2), 3, axis=1).tolist() == [[1, 0, 2], [3, 0, 4]]
    assert carry_axis(np.array([5, 6], np.float32), (0, 2), 3, axis=0).tolist() == [5, 0, 6]
    assert carry_axis(values, None, 7, axis=0) is values
    assert carry_axis(values[:0], (), 2, axis=0).tolist() == [[0, 0], [0, 0]]


def test_the_shape_of_a_spread_tensor_is_known_before_its_values() -> None:
    assert Spread((0, 2), 5, axis=0).shape((2, 4)) == (5, 4)
    assert Spread((0, 2), 5, axis=1).shape((4, 2)) == (4, 5)
    assert Spread(None, 5, axis=1).shape((4, 2)) == (4, 2)


def test_a_carried_pair_changes_what_the_narrow_layer_computed_and_nothing_else() -> None:
    """The carried product on the kept inputs is the narrow one; removed inputs and outputs have no part in it."""
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 3), np.float32), draw.standard_normal((4, 2), np.float32)
    kept = KeptFeatures(inputs=(0, 2, 5), outputs=(1, 2, 4, 6))
    carried = carry_axis(b, kept.outputs, 8, axis=0) @ carry_axis(a, kept.inputs, 6, axis=1)  # (8, 6)
    assert np.array_equal(carried[np.ix_(kept.outputs, kept.inputs)], b @ a)
    assert np.count_nonzero(carried) == 12


def test_a_map_must_lead_from_the_bundle_to_the_base(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of(blocks=5)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    model, issued = open_base(Base(base)), Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert carry_of(issued) == CarryMap.of((0, 1, 4)) == carry_of(dataclasses.replace(issued, carry=None))
    require_fitting_map(carry_of(issued), model, bundle.manifest)
    inputs, outputs = bundle.manifest.lora_targets["model.layers.0.self_attn.q_proj"]
    narrow = {0: {"self_attn.q_proj": KeptFeatures(inputs=tuple(range(inputs)), outputs=(0, outputs))}}
    for wrong, reason in (
        (CarryMap.of((0, 1)), "the map has 2 blocks, the bundle 3"),
        (CarryMap.of((0, 1, 5)), "the base has no block 5"),
        (CarryMap.of((0, 1, 4), narrow), f"the map gives 2 of {outputs} outputs, the bundle has {outputs}"),
    ):
        with pytest.raises(IncompatibleError, match="restore the ledger") as caught:
            require_fitting_map(wrong, model, bundle.manifest)
        assert any(reason in one for one in caught.value.reasons), caught.value.reasons


def test_a_lost_map_is_an_error_where_it_is_needed(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """A home whose ledger an earlier version wrote, or that was put together by hand, cannot guess the rows."""
    base, every = base_of(blocks=3), {"bottom": None, "top": None, "keep": None, "placement": "every"}
    bundle = packed(base, tmp_path / "bundle", parties, **every, mlp_width=0.5)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    with sqlite3.connect(parties.owner.ledger) as db:
        db.execute("UPDATE bundles SET carry = NULL")
    db.close()
    accepted = intake(returned.folder, parties.owner)
    with pytest.raises(IncompatibleError, match="the ledger has no map for this bundle") as caught:
        plug_in(Base(base), accepted, tmp_path / "plugged", PlugInSpec(), parties.owner)
    assert "restore the ledger" in str(caught.value.next_step)
    assert not (tmp_path / "plugged").exists()
