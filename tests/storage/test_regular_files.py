"""Nothing but a regular file is opened, and no more of it is read than was asked for."""

import os
import socket
from pathlib import Path

import pytest

from offsite.errors import VerificationError
from offsite.storage.regular_files import open_regular, read_bounded

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and links are a matter of POSIX")


def make(file: Path, kind: str) -> None:
    target = file.with_name("target")
    target.write_bytes(b"secret")
    if kind == "link":
        file.symlink_to(target)
    elif kind == "link to nothing":
        file.symlink_to(file.with_name("nothing"))
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(file))


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder", "pipe", "socket"])
def test_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("file"), kind)
    with pytest.raises(VerificationError, match="'file' is not a plain file"):
        read_bounded(Path("file"), 10)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_takes_the_place_of_a_file_as_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between the look and the opening; a pipe would be waited for without end."""
    file, opened = tmp_path / "file", os.open
    file.write_bytes(b"honest")

    def swapped(path: Path, flags: int) -> int:
        file.unlink()
        make(file, kind)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(VerificationError, match="'file' is not a plain file"):
        open_regular(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "file")


def test_one_byte_more_shows_that_a_file_is_larger(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    assert len(read_bounded(tmp_path / "file", 99)) == 100
    assert read_bounded(tmp_path / "file", 5000) == b"x" * 5000
    assert read_bounded(tmp_path / "file", 10**9) == b"x" * 5000
