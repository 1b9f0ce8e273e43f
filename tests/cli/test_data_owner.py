import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import main
from offsite.training.run_log import last_record, log_file
from tiny import Parties, tiny_base, tiny_bundle, tiny_parties, tiny_rows

SETTINGS = ("--rank", "2", "--max-steps", "2", "--batch-size", "4")
Tune = Callable[..., int]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parties]:
    """A folder with a bundle and rows, and both parties."""
    folder = tmp_path_factory.mktemp("house")
    parties = tiny_parties(folder)
    tiny_bundle(tiny_base(folder / "base", blocks=3), folder / "bundle", parties, keep=1)
    tiny_rows(folder / "rows.jsonl", 8)
    return folder, parties


@pytest.fixture
def tune(house: tuple[Path, Parties], tmp_path: Path) -> Tune:
    """Run `offsite tune` into `return` of the test's folder; what is given comes behind."""
    folder, parties = house

    def run(*words: object) -> int:
        usual: list[object] = [folder / "bundle", "--data", folder / "rows.jsonl", "--out", tmp_path / "return"]
        usual += ["--home", parties.data_owner.folder, *SETTINGS]
        return main(["tune", *(str(word) for word in (*usual, *words))])

    return run


def test_how_the_tuning_went_is_told_and_stays(
    tune: Tune, house: tuple[Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--eval-data", house[0] / "rows.jsonl", "--json") == 0
    captured = capsys.readouterr()
    tuning: dict[str, Any] = json.loads(captured.out)["tuning"]
    log = log_file(tmp_path / "return")
    step, held_out = last_record(log, "step"), last_record(log, "validation")
    assert step is not None
    assert held_out is not None
    assert (tuning["steps"], tuning["loss"], tuning["eval_loss"]) == (2, step["loss"], held_out["loss"])
    assert tuning["seconds"] > 0
    assert tuning["log"] == str(log)
    assert tuning["kernels"]["backend"] == "cpu"
    assert {"RMS norms", "attention", "LoRA layers"} <= {piece["name"] for piece in tuning["kernels"]["pieces"]}
    assert len([line for line in captured.err.splitlines() if line.startswith("offsite: kernels: cpu")]) == 1
    assert f"the log {log} stays with you" in captured.err
    assert all(b"loss" not in file.read_bytes() for file in (tmp_path / "return").iterdir())


def test_the_return_is_announced_when_everything_is_found_good(
    tune: Tune, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert tune("--data", tmp_path / "nothing.jsonl") == 2
    assert "will hold" not in capsys.readouterr().err
    assert tune() == 0
    lines = capsys.readouterr().err.splitlines()
    stages = [next((at for at, line in enumerate(lines) if word in line), -1) for word in ("reading", "hold", "tuning")]
    assert stages == sorted(stages)
    assert -1 not in stages


def test_a_finished_run_is_resumed_to_the_same_end(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert tune("--resume", "--json") == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert (again["digest"], again["tuning"]["loss"]) == (first["digest"], first["tuning"]["loss"])
    assert "this run is finished" in captured.err
    assert tune() == 2  # who does not ask to resume is asking for another one
    assert tune("--resume", "--rank", "1") == 2
    file = tmp_path / "return" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert tune("--resume") == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log.jsonl"
    assert last_record(log, "step") is None
    log.write_text('{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n{"event": "validation"}\n{"event": "st')
    assert last_record(log, "step") == {"event": "step", "step": 2}
    assert last_record(log, "start") is None
