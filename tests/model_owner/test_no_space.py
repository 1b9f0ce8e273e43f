"""A disk that is full, a folder that may not be written, an interruption: the old state stays, and the error helps."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import full_return, lora_return, packed
from full_disk import Disk
from offsite.config import ImportSpec, PlugInSpec
from offsite.errors import StorageError, UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from tiny import MakeBase, Parties

Stage = Callable[[Path], object]


@pytest.fixture(params=["pack", "plug-in adapter", "plug-in merged", "plug-in full", "import"])
def stage(request: pytest.FixtureRequest, base_of: MakeBase, parties: Parties, tmp_path: Path) -> Stage:
    """A stage that writes a folder of the given name."""
    base = base_of(blocks=4)
    if request.param == "pack":
        return lambda out: packed(base, out, parties, keep=1)
    if request.param == "import":
        return lambda out: import_model(base, out, ImportSpec())
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    if request.param == "plug-in full":
        returned = full_return(bundle, tmp_path / "return", parties.data_owner).folder
        spec = PlugInSpec(again=True)
    else:
        returned = lora_return(bundle, tmp_path / "return", parties.data_owner).folder
        spec = PlugInSpec.model_validate({"as": request.param.split()[1], "again": True})
    return lambda out: plug_in(Base(base), intake(returned, parties.owner), out, spec, parties.owner)


def left(parent: Path) -> set[str]:
    """The names in a folder, without the logs that finished packings leave next to their bundles."""
    names = {path.name for path in parent.iterdir()}
    return names - {f"{name}.log.jsonl" for name in names}


def test_no_space_at_the_nth_write(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "outputs"
    parent.mkdir()
    disk = Disk(monkeypatch)
    stage(parent / "whole")
    total = disk.calls
    assert total >= 4
    for room in sorted({0, 1, 2, total // 2, total - 3, total - 2, total - 1}):
        disk.calls, disk.room = 0, room
        with pytest.raises(StorageError, match="No space left on device") as caught:
            stage(parent / "out")
        assert caught.value.exit_code == 1
        assert "free some space" in (caught.value.next_step or "")
        assert left(parent) == {"whole"}
    disk.room = None
    stage(parent / "out")
    assert left(parent) == {"whole", "out"}
    assert left(parent / "out") == left(parent / "whole")


def test_empty_output_folder_is_as_it_was(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(monkeypatch)
    disk.room = 2
    with pytest.raises(StorageError):
        stage(out)
    assert left(out) == set()
    disk.room = None
    stage(out)
    assert left(out)


def test_rename_that_fails(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "outputs"
    parent.mkdir()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(StorageError, match="cannot write"):
            stage(parent / "out")
    assert left(parent) == set()
    stage(parent / "out")


@pytest.mark.parametrize("where", ["write", "rename"])
def test_interruption(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C leaves no half a folder behind."""
    parent = tmp_path / "outputs"
    parent.mkdir()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "write") if where == "write" else (Path, "rename")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            stage(parent / "out")
    assert left(parent) == set()


def test_folder_that_may_not_be_written(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected, for the tests may run as root, whom no mode stops."""
    parent = tmp_path / "outputs"
    parent.mkdir()
    real = Path.mkdir

    def refuse(self: Path, *arguments: Any, **settings: Any) -> None:
        if self.parent == parent:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        real(self, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        with pytest.raises(StorageError, match="Permission denied") as caught:
            stage(parent / "out")
    assert "may write to" in (caught.value.next_step or "")
    assert left(parent) == set()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_really_may_not_be_written(stage: Stage, tmp_path: Path) -> None:
    parent = tmp_path / "outputs"
    parent.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        stage(parent / "out")


def test_parent_that_is_a_file(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file"):
        stage(tmp_path / "file" / "out")


def test_failed_plug_in_is_not_entered(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the same command works once there is space, without --again."""
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    disk = Disk(monkeypatch)
    for room in (0, 3):
        disk.calls, disk.room = 0, room
        with pytest.raises(StorageError):
            plug_in(Base(base), intake(returned.folder, parties.owner), tmp_path / "out", PlugInSpec(), parties.owner)
        assert Ledger(parties.owner.ledger).plugged_in(returned) == []
    disk.room = None
    plug_in(Base(base), intake(returned.folder, parties.owner), tmp_path / "out", PlugInSpec(), parties.owner)
    assert len(Ledger(parties.owner.ledger).plugged_in(returned)) == 1


def test_rename_that_fails_is_not_entered(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(StorageError):
            plug_in(Base(base), intake(returned.folder, parties.owner), tmp_path / "out", PlugInSpec(), parties.owner)
    assert Ledger(parties.owner.ledger).plugged_in(returned) == []
    plug_in(Base(base), intake(returned.folder, parties.owner), tmp_path / "out", PlugInSpec(), parties.owner)
