import io
import json
from pathlib import Path

import pytest

from fresh_process import HEAVY, modules_after
from offsite.cli import main
from offsite.cli.study_progress import StudyTable, _last_line
from offsite.study.run_grid import StudyEvent
from offsite.study.run_lock import lock_study
from studies import RECIPE, Played, lay_out

ZERO_SHOT = RECIPE.replace('base = "base"', 'base = "base"\nrows = ["zero_shot"]')
ZERO_SHOT = ZERO_SHOT.replace(
    ZERO_SHOT[ZERO_SHOT.index('[[data]]\nname = "choices"') : ZERO_SHOT.index("[[pack]]")], ""
)


def test_stages_are_processes_of_their_own(tmp_path: Path) -> None:
    """And the one that starts them stays small, since a child's peak counts from its parent's size upwards."""
    file = lay_out(tmp_path, ZERO_SHOT)
    assert not HEAVY & modules_after("study", file, "--out", tmp_path / "out", "--json")
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "out" / "stages").iterdir()]
    assert (record["stage"], record["party"], record["done"]) == ("eval", "experimenter", True)
    assert record["seconds"] > 0
    assert record["peak_bytes"] > 100 * 2**20  # torch is in it
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_report_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played = Played(lay_out(tmp_path), tmp_path / "out")
    stage = played.points[0].rows["zero_shot"]
    played.points[0] = played.points[0].__class__(**{**vars(played.points[0]), "rows": {"zero_shot": stage}})
    del played.points[1]
    assert played.go() == 0
    words = ["study", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out"), "--report-only"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["cells"][0]["scores"]) == {"zero_shot"}
    assert result["cells"][1]["scores"] == {}
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "Held-out loss" in out
    assert "Nats per labelled token" in out
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 1  # nothing was run
    for path in (tmp_path / "out", tmp_path / "out" / "results.json"):
        assert main(["inspect", str(path)]) == 0
        assert capsys.readouterr().out == out
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == result
    (tmp_path / "out" / "results.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "--report-only" in capsys.readouterr().err


def test_two_runs_of_one_study_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", str(lay_out(tmp_path)), "--out", str(tmp_path / "out")]
    (tmp_path / "out" / "stages").mkdir(parents=True)
    with lock_study(tmp_path / "out"):
        assert main(words) == 2
        assert "another run of a study is at work" in capsys.readouterr().err
        assert not (tmp_path / "out" / "results.json").exists()  # the other one's to write
        assert list((tmp_path / "out" / "stages").iterdir()) == []
        assert main([*words, "--report-only"]) == 0
    with lock_study(tmp_path / "out"):  # released
        pass


def test_a_check_needs_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ZERO_SHOT.replace('base = "base"', 'base = "gone"\narchitecture = "gpt2"\nblocks = 5')
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    assert main(["study", str(file), "--check", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["cells"], result["tried_stages"], result["failed"]) == (1, 1, [])
    assert len(result["missing"]) == 3
    assert set(tmp_path.iterdir()) == {file}


def test_a_check_says_what_cannot_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace('method = "lora"\nrank = 2', 'method = "bitfit"').replace(
        'base = "base"', 'base = "base"\nrows = ["emulator"]'
    )
    file = lay_out(tmp_path, text)
    assert main(["study", str(file), "--check", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)  # one document
    assert any("BitFit trains biases" in failure for failure in result["failed"])


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(lay_out(tmp_path))]) == 2
    assert "name a folder with --out" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "recipe.toml"), "--check", "--report-only"]) == 2
    assert "give one of the two" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('base = "base"', 'base = "gone"'))
    assert main(["study", str(tmp_path / "recipe.toml"), "--check"]) == 2
    assert 'architecture = "llama"' in capsys.readouterr().err


def test_the_board_shows_where_a_study_is(tmp_path: Path) -> None:
    from rich.console import Console

    points = Played(lay_out(tmp_path), tmp_path / "out").points
    table = StudyTable(points)
    log = tmp_path / "log.txt"
    log.write_text("offsite: loading\noffsite: tuning 3/60 loss 1.5\n")
    table.on_event(StudyEvent("stage", 4, 30, "tune", log=log))
    table.on_event(StudyEvent("score", 4, 30, "", 0, "zero_shot", 2.5))
    table.on_event(StudyEvent("failure", 4, 30, "no", 1, "full"))
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "2.500" in text
    assert "failed" in text
    assert "[4/30] tune  0:0" in text
    assert "tuning 3/60 loss 1.5" in text
    assert _last_line(tmp_path / "nothing") == ""
