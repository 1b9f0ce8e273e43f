import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import main
from offsite.data_owner.finished_run import FINISHED
from offsite.data_owner.train import SAME_ROWS
from offsite.training.run_log import last_record, log_file, run_folder
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


def run_tune(house: tuple[Path, Parties], tmp_path: Path, *words: object) -> int:
    """Run `offsite tune` on the house's rows into `return` of the test's folder; flags given in `words` win."""
    usual = {"--data": house[0] / "rows.jsonl", "--out": tmp_path / "return"}
    missing = [word for flag, value in usual.items() if flag not in words for word in (flag, value)]
    return main(["tune", *(str(word) for word in (house[0] / "bundle", *missing, *words))])


@pytest.fixture
def tune(house: tuple[Path, Parties], tmp_path: Path) -> Tune:
    """Run `offsite tune` with the usual settings in the data owner's home; flags given in words win."""

    def run(*words: object) -> int:
        usual = ["--home", house[1].data_owner.folder, *SETTINGS]
        missing = [word for at in range(0, len(usual), 2) if usual[at] not in words for word in usual[at : at + 2]]
        return run_tune(house, tmp_path, *missing, *words)

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


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_a_finished_run_is_resumed_to_the_same_end(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Another run is refused as an unfinished one would be, whatever the method."""
    usual = ("--method", method, "--json")
    assert tune(*usual) == 0
    first = json.loads(capsys.readouterr().out)
    assert tune(*usual, "--resume") == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert (again["digest"], again["tuning"]["loss"]) == (first["digest"], first["tuning"]["loss"])
    assert "this run is finished" in captured.err
    assert tune(*usual) == 2  # who does not ask to resume is asking for another one
    capsys.readouterr()
    other = tiny_rows(tmp_path / "other.jsonl", 9)
    assert tune(*usual, "--resume", "--max-steps", "3", "--data", other) == 2
    reasons = json.loads(capsys.readouterr().out)["error"]["reasons"]
    assert [reason.partition(":")[0] for reason in reasons] == ["data", "max_steps"]
    assert reasons[1] == "max_steps: 2 in the finished run, 3 now"


def test_a_return_that_cannot_be_compared_is_no_finished_run(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune() == 0
    log = log_file(tmp_path / "return")
    log.rename(tmp_path / "elsewhere")
    assert tune("--resume") == 2
    assert "does not say which settings and data made it" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(log)
    assert tune("--resume", "--plan") == 0
    assert "this run is finished" in capsys.readouterr().err
    file = tmp_path / "return" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert tune("--resume") == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_run_that_stopped_after_its_return_is_finished(tune: Tune, tmp_path: Path) -> None:
    """The return was written, and the process ended before the log said so."""
    assert tune() == 0
    log, run = log_file(tmp_path / "return"), run_folder(tmp_path / "return")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(record) + "\n" for record in records if record["event"] != FINISHED))
    run.mkdir()
    (run / "run.json").write_text(json.dumps(records[-1]["run"]))
    assert tune("--resume", "--rank", "1") == 2
    assert run.exists()
    assert tune("--resume") == 0
    assert not run.exists()
    assert tune("--resume") == 0


def test_the_issuers_home_is_refused_before_anything_trains(
    tune: Tune, house: tuple[Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner's verification would refuse the return in the end."""
    owner = ("--home", house[1].owner.folder)
    for words in (owner, (*owner, "--plan"), (*owner, "--check")):
        assert run_tune(house, tmp_path, *words) == 2
        err = capsys.readouterr().err
        assert "whose home alone can tune it" in err
        assert "which issued the bundle" in err
        assert "reading the rows" not in err


@pytest.mark.parametrize("held_out", [True, False])
def test_losses_before_and_after_are_told_to_be_the_emulators(
    tune: Tune, house: tuple[Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: bool
) -> None:
    """On the same rows, held out or those of the first step: different rows would not show what training changed."""
    name, event = ("eval_loss", "validation") if held_out else ("same_rows_loss", SAME_ROWS)
    words = ("--eval-data", house[0] / "rows.jsonl") if held_out else ()
    assert tune("--json", "--max-steps", "6", "--lr", "0.02", *words) == 0
    captured = capsys.readouterr()
    tuning, log = json.loads(captured.out)["tuning"], log_file(tmp_path / "return")
    ends = [last_record(log, event, step) for step in (0, 6)]
    assert [tuning[f"{name}_before"], tuning[name]] == [end["loss"] for end in ends if end]
    assert tuning[name] < tuning[f"{name}_before"] - 0.1
    first = last_record(log, "step", 1)
    assert held_out or (first and tuning[f"{name}_before"] == pytest.approx(first["loss"], rel=1e-5))
    assert ("same_rows_loss" in tuning) is not held_out
    assert tuning["losses_of"] == "emulator"
    assert "not of the plug-in" in captured.err


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_a_run_of_few_steps_is_told_to_be_short(
    house: tuple[Path, Parties], tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: tuple[str, ...]
) -> None:
    words = ("--home", house[1].data_owner.folder, "--rank", "2", *plan)
    assert run_tune(house, tmp_path, *words) == 0
    assert "note: 1 step is few (8 rows, 16 in a step, epochs = 1)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "return", ignore_errors=True)
    assert run_tune(house, tmp_path, *words, "--max-steps", "1") == 0  # as many as were asked for
    assert "note: " not in capsys.readouterr().err


def test_a_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log.jsonl"
    assert last_record(log, "step") is None
    log.write_text('{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n{"event": "validation"}\n{"event": "st')
    assert last_record(log, "step") == {"event": "step", "step": 2}
    assert last_record(log, "start") is None
