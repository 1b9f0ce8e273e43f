import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.errors import StorageError, UsageError
from offsite.storage.files import (
    Written,
    replace_file,
    require_free,
    sha256_of,
    staged_folder,
    storage_errors,
    write_stream,
)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with staged_folder(out) as folder:
        assert not out.exists()
        assert folder.parent == out.parent
        (folder / "x").write_text("x")
    assert names(out) == {"x"}
    assert names(out.parent) == {"out"}


def test_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path / "out") == {"x"}


def test_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged_folder(Path("out")) as folder:
        (folder / "x").write_text("x")
    with staged_folder(Path("../there")) as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == {"here", "there"}
    assert names(tmp_path / "here") == {"out"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StorageError])
def test_nothing_appears_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("x")
            raise error("no")

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == set()


def test_os_error_of_the_block_becomes_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left") as caught, staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")
    assert caught.value.reasons == ("failed at some file",)
    assert "free some space" in (caught.value.next_step or "")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "may write to"),
        (errno.EPERM, "may write to"),
        (errno.EROFS, "not read-only"),
        (errno.EIO, "check the path and the disk"),
    ],
)
def test_advice(code: int, says: str) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path("x")):
        raise OSError(code, os.strerror(code))
    assert says in (caught.value.next_step or "")
    assert caught.value.exit_code == 1


def make_file(path: Path) -> None:
    path.write_text("x")


def make_full(path: Path) -> None:
    path.mkdir()
    (path / "x").write_text("x")


def make_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def make_dead_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def advice(out: Path) -> str:
    with pytest.raises(UsageError) as caught:
        require_free(out)
    return caught.value.next_step or ""


def test_the_advice_fits_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_file(out)
    assert "move this file away" in advice(out)
    assert "not inside a file" in advice(out / "in" / "it")
    out.unlink()
    out.symlink_to(tmp_path / "a target")
    assert f"name --out '{tmp_path / 'a target'}'" in advice(out)
    require_free(tmp_path / "a target")
    out.unlink()
    out.mkdir()
    (out / ".DS_Store").write_text("x")
    assert advice(out) == f"delete what a program left there: rm -r {out / '.DS_Store'}"
    (out / "mine").write_text("x")
    assert "move this one away" in advice(out)


@pytest.mark.parametrize("length", [240, 241])
def test_a_long_name(tmp_path: Path, length: int) -> None:
    out = tmp_path / ("x" * length)
    if length > 240:
        assert "shorter name" in advice(out)
        return
    with staged_folder(out) as folder:
        (folder / "x").write_text("x")
    replace_file(out.with_name(f"{out.name}.log.jsonl"), b"x")  # what is written beside it
    assert names(out) == {"x"}


def test_an_empty_folder_stays_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may stand in it, and it may have permissions of its own."""
    (tmp_path / "here").mkdir(mode=0o750)
    monkeypatch.chdir(tmp_path / "here")
    before = Path().stat()
    with staged_folder(Path()) as folder:
        (folder / "x.json").write_text("x")
        (folder / "y").mkdir()
    assert names(Path()) == {"x.json", "y"}
    assert (Path().stat().st_ino, Path().stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == {"here"}


def test_an_empty_folder_in_one_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another disk is mounted: the temporary folder is inside."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with staged_folder(tmp_path / "disk") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "x").write_text("x")
    assert names(tmp_path / "disk") == {"x"}


@pytest.mark.parametrize("make", [make_file, make_full, make_link, make_dead_link])
def test_what_is_there_is_not_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    make(out)
    with pytest.raises(UsageError, match="is not an empty folder") as caught:
        require_free(out)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError), staged_folder(out):
        raise AssertionError("the block ran")


def test_unreadable_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()

    def refuse(self: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        require_free(tmp_path / "out")


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def be_slow() -> None:
        with staged_folder(out) as folder:
            (folder / "x").write_text("ours")
            make_full(out)

    with pytest.raises(StorageError):
        be_slow()
    assert (out / "x").read_text() == "x"
    assert names(tmp_path) == {"out"}


def test_stream_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    chunks = [b"one", bytearray(b"two"), memoryview(b"three"), b""]
    written = write_stream(tmp_path / "x", chunks)
    assert (tmp_path / "x").read_bytes() == b"onetwothree"
    assert written == Written("x", 11, hashlib.sha256(b"onetwothree").hexdigest())
    assert written.sha256 == sha256_of(tmp_path / "x")
    with pytest.raises(FileExistsError):
        write_stream(tmp_path / "x", [b"again"])


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, view[:3]))
    write_stream(tmp_path / "x", [b"0123456789"])
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_replacing_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a" / "key"
    replace_file(file, b"one", mode=0o600)
    assert file.stat().st_mode & 0o777 == 0o600
    replace_file(file, b"two", mode=0o600)
    assert file.read_bytes() == b"two"
    assert names(tmp_path / "a") == {"key"}


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_replacing_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner: Any = {"write": os, "fsync": os, "replace": Path}[where]
    with monkeypatch.context() as patched:
        patched.setattr(owner, where, refuse)
        with pytest.raises(StorageError):
            replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == {"x"}


def test_a_parent_that_cannot_be_synced_does_not_undo_what_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, *more: Any) -> int:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *more)

    monkeypatch.setattr(os, "open", refuse)
    with staged_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path / "out") == {"x"}
