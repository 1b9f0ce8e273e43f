"""The data owner's disk is full: no half a return, and with room the same command goes on to the same bytes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from artifacts import packed
from offsite.config import TuneSpec
from offsite.data_owner.tune import tune
from offsite.errors import StorageError
from offsite.protocol.artifacts import Return
from offsite.storage import files
from tiny import tiny_base, tiny_parties, tiny_rows

Tune = Callable[[str], Return]


class Disk:
    """Counts the writes; `room` is how many succeed, or None."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.room: int | None = None
        self.real = files._write
        monkeypatch.setattr(files, "_write", self.write)

    def write(self, descriptor: int, content: Any) -> None:
        self.calls += 1
        if self.room is not None and self.calls > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real(descriptor, content)


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
