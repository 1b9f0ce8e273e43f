"""Search: never worse than where it starts, every candidate judged once, and remembered over an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest

from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.pack import pack
from offsite.model_owner.partition import partition
from offsite.model_owner.select.search import improve, moves, select, starts
from offsite.model_owner.select.selection_protocol import Selection
from offsite.progress import Event, silent
from offsite.protocol.artifacts import Base
from tiny import MakeBase, Parties


def spec(**settings: Any) -> PackSpec:
    chosen = {"bottom": 1, "top": 1, "keep": 2, "select": "search", "calibration_tokens": 1024, "compute": "fp32"}
    return PackSpec.model_validate({**chosen, "threads": 1, "search_minutes": 0.2, **settings})


def test_a_move_changes_one_block() -> None:
    found = list(moves((1, 3), range(1, 6), seed=0))
    assert sorted(found) == [(1, 2), (1, 4), (1, 5), (2, 3), (3, 4), (3, 5)]
    assert found == list(moves((1, 3), range(1, 6), seed=0))
    assert found != list(moves((1, 3), range(1, 6), seed=1))


def test_it_starts_from_uniform_and_contiguous_drops() -> None:
    assert starts(range(1, 7), 2) == [(1, 6), (1, 2)]
    assert starts(range(1, 7), 3) == [(1, 3, 6), (1, 5, 6), (1, 2, 6), (1, 2, 3)]


def test_it_walks_downhill_to_where_no_move_helps() -> None:
    def score(blocks: tuple[int, ...]) -> float:
        return abs(sum(blocks) - 9) + 0.1 * blocks[0]

    found = improve((1, 2), range(1, 7), score, 0, lambda: True)
    assert all(score(found) <= score(one) for one in moves(found, range(1, 7), 0))
    assert score(found) < score((1, 2))
    assert improve((1, 2), range(1, 7), score, 0, lambda: False) == (1, 2)


@pytest.mark.parametrize("heal", ["none", "refit", "affine"])
def test_the_best_of_what_was_judged(base_of: MakeBase, tmp_path: Path, heal: str) -> None:
    model = open_base(Base(base_of(blocks=7)))
    settings = spec(heal=heal, search_minutes=5)  # it ends by itself long before
    sandwich = partition(model, settings)
    found = select(Selection(model, sandwich, settings, tmp_path, silent))
    remembered = json.loads((tmp_path / "search.json").read_text())
    judged = {tuple(map(int, name.split())): nats for name, nats in remembered.items()}
    assert judged[found] == min(judged.values()) <= min(judged[start] for start in starts(sandwich.middle, 2))
    assert len(set(judged.values())) > 1
    known = dict.fromkeys(remembered, 1.0) | {"1 3": 0.5}
    (tmp_path / "chosen.json").unlink()
    (tmp_path / "search.json").write_text(json.dumps(known))  # what is known is not judged again
    assert select(Selection(model, sandwich, settings, tmp_path, silent)) == (1, 3)


def test_an_interrupted_search_goes_on(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base, out = Base(base_of(blocks=7)), tmp_path / "out"

    def stop(event: Event) -> None:
        if event.stage == "searching for blocks" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(base, out, "hospital", spec(heal="none"), parties.owner, stop)
    judged = json.loads((tmp_path / "out.run" / "search.json").read_text())
    assert len(judged) == 2
    bundle = pack(base, out, "hospital", spec(heal="none", search_minutes=0.1), parties.owner, resume=True)
    assert bundle.manifest.split.emulator == 2
    assert not (tmp_path / "out.run").exists()


def test_healing_goes_on_with_what_an_ended_search_chose(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base, out = Base(base_of(blocks=7)), tmp_path / "out"
    steps = {"heal": "refit,distill", "distill_tokens": 1024, "distill_steps": 60, "dtype": "fp32"}

    def stop(event: Event) -> None:
        if event.stage == "distilling" and event.done == 51:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(base, out, "hospital", spec(**steps, search_minutes=1e-4), parties.owner, stop)
    chosen = json.loads((tmp_path / "out.run" / "chosen.json").read_text())
    remembered = json.loads((tmp_path / "out.run" / "search.json").read_text())
    remembered |= {"2 4": 0.0}  # what more time would find
    (tmp_path / "out.run" / "search.json").write_text(json.dumps(remembered))
    bundle = pack(base, out, "hospital", spec(**steps, search_minutes=5), parties.owner, resume=True)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert list(issued.kept) == [0, *chosen, 6]
