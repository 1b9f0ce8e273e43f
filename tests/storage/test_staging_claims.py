"""What killed processes leave is removed, and nothing that a living one uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offsite.storage.files import discard_folder, private_folder, staged_folder
from offsite.storage.staging_claims import is_abandoned, sweep

posix = pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
KILLED = """
import os, signal, sys
from pathlib import Path
from offsite.storage.files import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_a_killed_processs_folder_is_swept_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    (left,) = tmp_path.iterdir()
    assert is_abandoned(left)
    with staged_folder(out) as folder:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        assert not is_abandoned(folder)
        sweep(out)  # another process, for the same path
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@posix
def test_only_temporary_folders_of_this_path_are_swept(tmp_path: Path) -> None:
    kept = [".out.12345678.bak", ".other.12345678.tmp", ".out.1234567g.tmp", "out.12345678.tmp"]
    for name in [*kept, ".out.12345678.tmp"]:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.87654321.tmp").symlink_to(tmp_path / kept[0])
    sweep(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".out.87654321.tmp"}


def test_a_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process is killed while it deletes the files: the next run sweeps what is left."""
    folder = tmp_path / "out.run"
    folder.mkdir()
    (folder / "features.bin").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        discard_folder(folder)
    assert not folder.exists()
    if os.name == "posix":
        discard_folder(folder)
        assert list(tmp_path.iterdir()) == []


@posix
def test_a_private_folder_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    for name in ("open", "new"):
        private_folder(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
