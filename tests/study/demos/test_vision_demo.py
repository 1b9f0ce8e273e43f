"""The demo on images with a tiny encoder; its commands run in this process, each with the words that it would have."""

import gzip
import importlib.util
import json
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from offsite.cli import main
from offsite.cli.study import run_in_this_process
from offsite.errors import DataError
from offsite.study.demos.digits import digits_file, write_digits
from offsite.study.demos.vision_demo import ROWS, SPLIT
from offsite.study.resumable_chain import Chain
from tiny import tiny_pictures, tiny_vision_base

STEPS = 3


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every command that ran."""
    seen: list[list[str]] = []

    def run(_: Chain, given: Sequence[str | Path]) -> Any:
        seen.append([str(word) for word in given])
        return run_in_this_process(given, tmp_path / "log.txt").result

    monkeypatch.setattr(Chain, "run", run)
    return seen


def test_the_demo(tmp_path: Path, words: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_vision_base(tmp_path / "model", "dinov2", 12)
    tiny_pictures(tmp_path / "set" / "train", 30)
    tiny_pictures(tmp_path / "set" / "val", 4, seed=1)
    result, workdir = tmp_path / "result.json", tmp_path / "work"
    command = ["demo", "--vision", "--images", str(tmp_path / "set"), "--model", str(base), "--workdir", str(workdir)]
    command += ["--steps", str(STEPS), "--json", str(result)]
    assert main(command) == 0
    found = json.loads(result.read_text())
    assert [row["name"] for row in found["rows"]] == list(ROWS)
    for row in found["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["rows"] == 12
    assert found["task"] == {"train": 72, "test": 12, "own": 18, "classes": 3}
    assert found["settings"]["split"] == {**SPLIT, "emulator": 12 - sum(SPLIT.values())}
    accuracy = {row["name"]: row["accuracy"] for row in found["rows"]}
    assert found["gains"] == {
        "plug_in": pytest.approx(accuracy["plug-in"] - accuracy["zero-shot"]),
        "emulator": pytest.approx(accuracy["emulator"] - accuracy["zero-shot"]),
        "full": None, "gain_recovered": None, "own_gain": None,
    }  # fmt: skip
    assert sum(found["base_parameters"].values()) == pytest.approx(1, abs=1e-3)
    shown = capsys.readouterr().out
    for said in ("The plug-in is ", "The tuned emulator is ", "no share of its gain is known", "verbatim"):
        assert said in shown
    assert "Accuracy on 12 held-out pictures of 3 classes" in shown
    assert all(name in shown for name in ROWS)
    with Image.open(workdir / "predictions.png") as sheet:
        assert sheet.width > 6 * 176
    assert str(workdir / "predictions.png") in shown
    listed = {line for file in ("train.csv", "test.csv") for line in _paths(workdir / "data-owner" / file)}
    assert not listed & set(_paths(workdir / "model-owner" / "pictures.csv"))  # nobody shares pictures
    before = len(words)
    assert main(command) == 0
    assert len(words) == before  # nothing is done twice


def _paths(file: Path) -> list[str]:
    return [line.split(",")[0] for line in file.read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--images", "x"], "--images is for the demo on pictures"),
        (["--vision", "--images", "x", "--data", "y"], "cannot be used with --vision"),
        (["--vision", "--images", "x", "--full"], "cannot be used with --vision"),
    ],
)
def test_flags_that_do_not_go_together(
    tmp_path: Path, given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *given, "--workdir", str(tmp_path / "work")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_too_few_pictures(tmp_path: Path, words: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_vision_base(tmp_path / "model", "dinov2", 12)
    tiny_pictures(tmp_path / "set", 1)
    arguments = ["--images", str(tmp_path / "set"), "--model", str(base), "--workdir", str(tmp_path / "work")]
    assert main(["demo", "--vision", *arguments]) == 2
    assert "too few pictures" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package with the digits' file lies; the file, with 20 lines a class that differ."""
    file = tmp_path / "sklearn" / "datasets" / "data" / "digits.csv.gz"
    file.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = [[*(draw.integers(0, 8, 64) + 8 * (np.arange(64) // 6 == label)), label] for label in range(10)] * 20
    file.write_bytes(gzip.compress("".join(f"{','.join(map(str, line))}\n" for line in lines).encode()))
    spec = ModuleSpec("sklearn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "sklearn")]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: spec if name == "sklearn" else found(name, *more)
    )
    return file


def test_without_pictures_it_runs_on_handwritten_digits(
    tmp_path: Path, words: list[list[str]], installed: Path
) -> None:
    base, result = tiny_vision_base(tmp_path / "model", "dinov2", 12), tmp_path / "result.json"
    command = ["demo", "--vision", "--model", str(base), "--workdir", str(tmp_path / "work"), "--json", str(result)]
    assert main([*command, "--steps", "2"]) == 0
    found = json.loads(result.read_text())
    assert [row["name"] for row in found["rows"]] == list(ROWS)
    assert found["task"] == {"train": 120, "test": 50, "own": 30, "classes": 10}
    tune = next(one for one in words if "tune" in one)
    assert "augment = false" in Path(tune[tune.index("--config") + 1]).read_text()


def test_digits_as_pictures(tmp_path: Path, installed: Path) -> None:
    assert write_digits(digits_file(), tmp_path / "out") == {"pictures": 200}
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == list("0123456789")
    with Image.open(tmp_path / "out" / "3" / "0003.png") as image:
        assert image.size == (96, 96)
        assert np.asarray(image).max() > 128
    installed.write_bytes(gzip.compress(b"1,2,3\n"))
    with pytest.raises(DataError, match="does not hold the digits"):
        write_digits(installed, tmp_path / "none")
    installed.write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot read the digits"):
        write_digits(installed, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_digits_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert main(["demo", "--vision", "--workdir", str(tmp_path / "work")]) == 2
    assert "[demo-vision]" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
