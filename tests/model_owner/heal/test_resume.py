"""Packing that was killed at any block goes on there, and its bundle is the one that it would have been."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.model_owner.heal import block_by_block, hidden_states
from offsite.model_owner.heal.hidden_states import FinishedBlock, HiddenStates, StatesFolder
from tiny import MakeBase, Parties

QUICK = {"calibration_tokens": 512, "compute": "fp32", "device": "cpu"}
DROPS: dict[str, Any] = {**QUICK, "keep": 3, "heal": "refit", "select": "influence"}
KINDS: dict[str, dict[str, Any]] = {
    "dropped blocks, refit": DROPS,
    "narrower blocks": {**QUICK, "keep": None, "narrow": 0.5, "heal": "refit"},
    "pruned blocks": {**QUICK, "keep": None, "prune": 0.5, "heal": "refit"},
}


class Power:
    """Ends packing at a step, and can put its run's folder back as a power cut at this moment would leave it."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.copy, self.solved = out.with_name(f"{out.name}.run"), out.with_name("saved"), 0
        self._ends: tuple[str, int] | None = None
        self._calls: Counter[str] = Counter()
        solve, store, save = block_by_block._solve, block_by_block._store, StatesFolder.save

        def solving(*arguments: Any) -> Any:
            self._count("solve")
            self.solved += 1
            return solve(*arguments)

        def storing(*arguments: Any) -> Any:
            stored = store(*arguments)
            self._count("store")
            return stored

        def saving(folder: StatesFolder, point: FinishedBlock) -> None:
            save(folder, point)
            self._count("save")

        monkeypatch.setattr(block_by_block, "_solve", solving)
        monkeypatch.setattr(block_by_block, "_store", storing)
        monkeypatch.setattr(StatesFolder, "save", saving)

    def ends_at(self, step: str, call: int) -> None:
        """End the next packing at a call of a step, counted from 1."""
        self._ends, self._calls = (step, call), Counter()

    def _count(self, step: str) -> None:
        self._calls[step] += 1
        if (step, self._calls[step]) == self._ends:
            self._ends = None
            shutil.rmtree(self.copy, ignore_errors=True)
            shutil.copytree(self.run, self.copy)
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Put the folder back as it was when packing ended."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.copy.rename(self.run)


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Power:
    return Power(tmp_path / "bundle", monkeypatch)


@pytest.mark.parametrize(("kind", "in_memory"), [*((kind, 0) for kind in KINDS), ("narrower blocks", 2**30)])
def test_a_killed_packing_goes_on_at_its_block(
    base_of: MakeBase, parties: Parties, tmp_path: Path, power: Power, kind: str, in_memory: int, monkeypatch: Any
) -> None:
    base, out = base_of("llama", 7), tmp_path / "bundle"
    expected = packed(base, tmp_path / "expected", parties, **KINDS[kind])
    blocks, power.solved = power.solved, 0
    monkeypatch.setattr(hidden_states, "IN_MEMORY", in_memory)
    for step, call in (("save", 1), ("store", 1), ("solve", 2)):  # the second block is solved twice
        power.ends_at(step, call)
        with pytest.raises(KeyboardInterrupt):
            packed(base, out, parties, **KINDS[kind])
        power.restore()
    bundle = packed(base, out, parties, **KINDS[kind])
    assert bundle.manifest.files == expected.manifest.files
    assert power.solved == blocks + 1
    assert not power.run.exists()


def test_other_settings_do_not_go_on_with_an_interrupted_packing(
    base_of: MakeBase, parties: Parties, tmp_path: Path, power: Power
) -> None:
    base, out = base_of("llama", 7), tmp_path / "bundle"
    power.ends_at("save", 1)
    with pytest.raises(KeyboardInterrupt):
        packed(base, out, parties, **DROPS)
    assert (power.run / "selected.json").exists()
    with pytest.raises(UsageError, match="another one") as caught:
        packed(base, out, parties, **{**DROPS, "keep": 2})
    assert f"rm -r {power.run}" in (caught.value.next_step or "")
    power.solved = 0
    packed(base, out, parties, **DROPS)
    assert power.solved == 2


def test_a_packing_without_a_finished_block_leaves_nothing(
    base_of: MakeBase, parties: Parties, tmp_path: Path, power: Power
) -> None:
    power.ends_at("solve", 1)
    with pytest.raises(KeyboardInterrupt):
        packed(base_of("llama", 7), tmp_path / "bundle", parties, **{**DROPS, "select": "uniform"})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("bundle", ".bundle"))) == []


def test_a_refused_packing_leaves_nothing(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise IncompatibleError("no", next_step="no")

    monkeypatch.setattr("offsite.model_owner.pack.open_bundle", refuse)
    with pytest.raises(IncompatibleError):
        packed(base_of("llama", 7), tmp_path / "bundle", parties, **DROPS)
    assert not (tmp_path / "bundle.run").exists()


def test_hidden_states_are_the_same_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.randn(2, 3 + extra, 4, generator=torch.Generator().manual_seed(extra)) for extra in range(3)]
    monkeypatch.setattr(hidden_states, "IN_MEMORY", 2 * states[0].nbytes)
    folder = StatesFolder(tmp_path, tmp_path / "state.json", torch.device("cpu"))
    own, base = folder.keep(states), folder.keep(states[:1])
    assert own.file is not None
    assert base.file is None
    assert all(torch.equal(found, one) for found, one in zip(own, states, strict=True))
    folder.save(FinishedBlock(4, 6, own, base))
    folder.discard(own, None)  # the resume point needs it
    found = StatesFolder(tmp_path, tmp_path / "state.json", torch.device("cpu")).load()
    assert found is not None
    assert (found.block, found.base_blocks, len(found.own), len(found.base)) == (4, 6, 3, 1)
    assert all(torch.equal(one, two) for one, two in zip(found.own, states, strict=True))
    assert torch.equal(found.base[0], states[0])


@pytest.mark.parametrize("spoil", ["record", "states"])
def test_a_damaged_resume_point_is_an_error(tmp_path: Path, spoil: str) -> None:
    folder = StatesFolder(tmp_path, tmp_path / "state.json", torch.device("cpu"))
    states = HiddenStates([torch.ones(1, 2, 3)], torch.device("cpu"))
    folder.save(FinishedBlock(1, 2, states, states))
    damaged = tmp_path / "state.json" if spoil == "record" else next(tmp_path.glob("states-*"))
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(StorageError, match="resume point"):
        folder.load()
