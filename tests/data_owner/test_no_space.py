"""The data owner's disk is full: no half a return, and with room the same command goes on to the same bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from artifacts import packed
from full_disk import Disk
from offsite.config import TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import StorageError
from offsite.protocol.artifacts import Return
from tiny import tiny_base, tiny_parties, tiny_rows

Tune = Callable[[str], Return]


def prepared(tmp_path: Path, method: Literal["lora", "full"]) -> Tune:
    parties = tiny_parties(tmp_path)
    bundle = packed(tiny_base(tmp_path / "base", "llama", 4), tmp_path / "bundle", parties, keep=1)
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    spec = TuneSpec(
        method=method, max_steps=2, batch_size=4, save_every=1, max_length=64, compute="fp32", device="cpu", threads=1
    )
    parent = tmp_path / "outputs"
    parent.mkdir()
    return lambda out: tune(bundle, rows, parent / out, spec, parties.data_owner, resume=True)


def fails(run: Tune, parent: Path, out: str) -> None:
    with pytest.raises(StorageError, match="No space left on device") as caught:
        run(out)
    assert caught.value.exit_code == 1
    assert "free some space" in (caught.value.next_step or "")
    assert not (parent / out).exists()
    assert not [p.name for p in parent.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Literal["lora", "full"]) -> None:
    run = prepared(tmp_path, method)
    disk = Disk(monkeypatch)
    whole = run("whole")
    total = disk.calls
    for room in (total - 1, total - 2, total // 2, 2, 1):
        disk.calls, disk.room = 0, room
        fails(run, tmp_path / "outputs", f"out-{room}")
        disk.room = None
        assert run(f"out-{room}").digest == whole.digest


def test_no_space_for_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(tmp_path, "lora")
    disk = Disk(monkeypatch)
    disk.room = 0
    fails(run, tmp_path / "outputs", "out")
    disk.room = None
    run("out")
