"""Data sets of the hub as they are downloaded: the subsets that README.md lists are honoured, or asked for by name."""

from pathlib import Path

import pytest

from offsite.data.data_files import data_digest, files_of
from offsite.data.hub_configs import configs_of
from offsite.data.read_rows import read_rows
from offsite.errors import DataError

ROW = '{"text": "a"}\n'


def laid_out(folder: Path, head: str, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(ROW.replace("a", file))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A card\n\nconfigs: not here\n")
    return folder


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


TWO = """
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: "main/train-*.jsonl"
  - split: test
    path: ["main/test-*.jsonl", "main/more.jsonl"]
- config_name: socratic
  data_files:
  - split: train
    path: socratic/rows.jsonl
"""
FILES = ("main/train-0.jsonl", "main/train-1.jsonl", "main/test-0.jsonl", "main/more.jsonl", "socratic/rows.jsonl")


def test_one_of_several_is_asked_for_by_name(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "gsm8k", TWO, *FILES, "other/never.jsonl")
    with pytest.raises(DataError, match="several data sets") as caught:
        files_of(folder)
    assert caught.value.reasons == ("its README.md lists the configs main, socratic",)
    assert caught.value.next_step == f"name one of them as {folder / 'main'}"
    assert names(files_of(folder / "main")) == ["train-0.jsonl", "train-1.jsonl"]  # a folder of that name
    assert names(files_of(folder / "socratic")) == ["rows.jsonl"]


def test_a_config_that_is_no_folder(tmp_path: Path) -> None:
    head = TWO.replace("config_name: main", "config_name: all of it")
    folder = laid_out(tmp_path / "set", head, *FILES)
    named = folder / "all of it"
    assert names(files_of(named)) == ["train-0.jsonl", "train-1.jsonl"]
    assert names(files_of(named, "held out")) == ["test-0.jsonl", "more.jsonl"]
    assert [row.completion for row in read_rows(named)] == ["main/train-0.jsonl", "main/train-1.jsonl"]
    before = data_digest(named)
    (folder / "socratic" / "rows.jsonl").write_text(ROW)
    assert data_digest(named) == before
    (folder / "main" / "more.jsonl").write_text(ROW)
    assert data_digest(named) != before


@pytest.mark.parametrize("mark", ["  default: true\n", None])
def test_the_default_is_read(mark: str | None, tmp_path: Path) -> None:
    head = (
        TWO.replace("- config_name: socratic\n", f"- config_name: socratic\n{mark}")
        if mark
        else TWO.replace("socratic\n", "default\n")
    )
    folder = laid_out(tmp_path / "set", head, *FILES)
    assert names(files_of(folder)) == ["rows.jsonl"]


@pytest.mark.parametrize(
    "data_files",
    [
        "rows/*.jsonl",
        "[rows/one.jsonl, rows/two.jsonl]",
        "{train: rows/*.jsonl, test: rows/two.jsonl}",
        "[{split: train, path: [rows/one.jsonl, 'rows/t*.jsonl']}]",
    ],
)
def test_every_form_of_data_files(data_files: str, tmp_path: Path) -> None:
    head = f"configs:\n- config_name: default\n  data_files: {data_files}"
    folder = laid_out(tmp_path / "set", head, "rows/one.jsonl", "rows/two.jsonl", "notes.jsonl")
    assert names(files_of(folder)) == ["one.jsonl", "two.jsonl"]


def test_a_folder_as_a_config(tmp_path: Path) -> None:
    head = "configs:\n- config_name: default\n  data_dir: inner"
    folder = laid_out(tmp_path / "set", head, "inner/train.jsonl", "inner/test.jsonl", "loose.jsonl")
    assert names(files_of(folder)) == ["train.jsonl"]
    assert names(files_of(folder, "held out")) == ["test.jsonl"]


@pytest.mark.parametrize("path", ["../outside.jsonl", "/etc/passwd", "hf://datasets/x/y.jsonl"])
def test_nothing_outside_is_read(path: str, tmp_path: Path) -> None:
    (tmp_path / "outside.jsonl").write_text(ROW)
    folder = laid_out(tmp_path / "set", f"configs:\n- config_name: a\n  data_files: {path}", "rows.jsonl")
    with pytest.raises(DataError, match="not in the folder"):
        files_of(folder)


def test_what_was_not_downloaded(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "set", TWO.partition("- config_name: socratic")[0])
    with pytest.raises(DataError, match="no such file was downloaded"):
        files_of(folder)


@pytest.mark.parametrize(
    "head", ["license: mit", "configs: none", "configs:\n- nothing", ": [", "configs:\n- config_name: x"]
)
def test_a_readme_without_configs_changes_nothing(head: str, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "set", head, "rows.jsonl")
    assert configs_of(folder) == {}
    assert names(files_of(folder)) == ["rows.jsonl"]
