import subprocess
from pathlib import Path

import pytest

from offsite.storage.leftovers import delete_command, is_leftover, leftovers_in, unfinished

LEFT = (
    ".DS_Store", "._config.json", "__MACOSX", ".AppleDouble", ".Spotlight-V100", ".fseventsd", ".localized", "Icon\r",
    "Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", "$RECYCLE.BIN", "System Volume Information",
    "config.json:Zone.Identifier", "~$notes.docx", ".directory", ".Trash-1000", ".goutputstream-X1Y2Z3", ".nfs0001",
    "lost+found", "@eaDir", ".stfolder", ".syncthing.model.safetensors.tmp", ".dropbox", ".git", ".gitattributes",
    ".gitignore", ".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__", ".vscode", "config.json~",
    ".config.json.swp", "config.json.bak", "#config.json#", ".~lock.rows.csv#", "model.safetensors.part",
    "model.safetensors.crdownload", "model.safetensors.filepart", "model.safetensors.aria2", "Unconfirmed.crdownload",
)  # fmt: skip
SENT = (
    "notes.txt",
    "pytorch_model.bin",
    "README.md",
    "adapter_config.json",
    "model.safetensors",
    "git",
    "cache",
    ".env",
)


@pytest.mark.parametrize("name", LEFT)
def test_what_programs_leave_behind(name: str) -> None:
    assert is_leftover(name)
    assert not is_leftover(name, [name])  # what belongs there is none


@pytest.mark.parametrize("name", [*SENT, ".DS_Store\n; rm -r ~", "a\x1b[2K.part", "x/../.DS_Store"])
def test_what_somebody_put_there(name: str) -> None:
    assert not is_leftover(name)


@pytest.mark.parametrize("name", ["x.safetensors.part", "x.safetensors.crdownload", ".x.safetensors.a1b2C3"])
def test_half_of_a_file_that_is_expected(name: str) -> None:
    assert unfinished(name, ["x.safetensors"]) == "x.safetensors"
    assert is_leftover(name, ["x.safetensors"])
    assert unfinished(name, ["y.safetensors"]) is None


def test_the_command_deletes_them_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with 'quotes' $HOME"
    folder.mkdir()
    for name in LEFT:
        (folder / name).write_text("x")
    (folder / "kept").write_text("x")
    assert len(leftovers_in(folder)) == len(LEFT)
    subprocess.run(["bash", "-c", delete_command(leftovers_in(folder))], check=True)
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert leftovers_in(tmp_path / "nothing") == []


def test_a_name_that_begins_with_a_dash_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "-rf~").write_text("x")
    subprocess.run(["bash", "-c", delete_command([Path("-rf~")])], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
