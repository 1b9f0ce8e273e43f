"""A study of pictures: the same grid and rows, compared by accuracy, of which more is better."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from fresh_process import HEAVY, modules_after
from offsite.cli.study import _report
from offsite.errors import IncompatibleError, UsageError
from offsite.evaluation.intervals import paired_interval
from offsite.evaluation.row_scores import read_row_scores
from offsite.study.prepare_study import prepare
from offsite.study.recipe import ROWS, load_recipe
from offsite.study.report.report_tables import tables
from studies import Played, Study, played_study
from tiny import tiny_pictures, tiny_vision_base

RECIPE = """
title = "Tiny pictures"
base = "base"

[shared]
max_steps = 12
batch_size = 6
compute = "fp32"
augment = false

[[data]]
name = "colours"
train = "set"
test = "set"
max_train_rows = 18
max_test_rows = 9

[[pack]]
name = "refit"
bottom = 1
top = 1
keep = 1
calibration = "own"

[[tune]]
name = "LoRA"
method = "lora"
rank = 2

[full]
lr = 1e-3
"""


def lay_out(folder: Path, recipe: str = RECIPE) -> Path:
    if not (folder / "base").exists():
        tiny_vision_base(folder / "base", "dinov2", 4)
        tiny_pictures(folder / "set" / "train", 8)
        tiny_pictures(folder / "set" / "val", 4, seed=1)
        tiny_pictures(folder / "own", 3, seed=2)
    file = folder / "recipe.toml"
    file.write_text(recipe)
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return played_study(lay_out(tmp_path_factory.mktemp("study")))


def test_every_row_is_scored_on_the_same_pictures(study: Study) -> None:
    assert study.results.primary == "accuracy"
    assert list(study.results.cells[0].scores) == list(ROWS)
    for score in study.results.cells[0].scores.values():
        assert (score.rows, score.tokens) == (9, 9)
        assert score.primary.value == score.accuracy
        assert score.accuracy is not None
        assert score.accuracy_stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 8))
    losses = {row: score.loss.value for row, score in study.results.cells[0].scores.items()}
    assert len(set(losses.values())) == len(ROWS)  # six models, and no two of them the same
    assert {row: losses[row] < math.log(3) for row in ROWS} == dict.fromkeys(ROWS, True)  # each knows something


def test_zero_shot_is_a_probe_of_the_training_pictures(study: Study) -> None:
    rows = study.played.points[0].rows
    probed = {row for row, stage in rows.items() if "--probe" in stage.words}
    assert probed == {"zero_shot", "emulator_zero_shot"}
    assert rows["zero_shot"].words[-1] == study.played.points[0].data.train


def test_figures_are_of_accuracies(study: Study) -> None:
    rows = {row: read_row_scores(stage.out) for row, stage in study.played.points[0].rows.items()}
    right = {row: sum(scores.right) / 9 for row, scores in rows.items()}
    against, gap = study.results.cells[0].scores["plug_in"].against_zero_shot, study.results.cells[0].plug_in_gap
    assert against is not None
    assert gap is not None
    ends = paired_interval(rows["plug_in"].right, rows["zero_shot"].right)
    assert ends is not None
    assert (against.low, against.high) == (ends.low, ends.high)
    assert against.value == pytest.approx(right["plug_in"] - right["zero_shot"])
    assert gap.value == pytest.approx(right["plug_in"] - right["emulator"])


def test_an_unchanged_study_runs_nothing(study: Study) -> None:
    again = Played(study.folder / "recipe.toml", study.folder / "out")
    assert again.go() == 0
    assert again.ran == []


def test_a_key_follows_the_pictures_and_not_their_places(study: Study, tmp_path: Path) -> None:
    other = Played(lay_out(tmp_path), tmp_path / "out")
    assert list(other.stages) == list(study.played.stages)
    Image.new("RGB", (20, 20), "white").save(tmp_path / "set" / "val" / "red" / "0.png")
    changed = Played(lay_out(tmp_path), tmp_path / "other")
    assert not {stage.key for stage in changed.points[0].rows.values()} & set(study.played.stages)


def test_pictures_in_a_table_of_bytes_are_written_out(study: Study, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lay_out(tmp_path)
    for part in ("train", "val"):
        files = sorted((tmp_path / "set" / part).rglob("*.png"))
        rows = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
        parquet.write_table(arrow.table(rows), tmp_path / f"{part}.parquet")
    text = RECIPE.replace('train = "set"', 'train = "train.parquet"').replace('test = "set"', 'test = "val.parquet"')
    assert list(Played(lay_out(tmp_path, text), tmp_path / "out").stages) == list(study.played.stages)


def test_a_report_shows_per_cent_and_pictures(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    out = study.folder / "out"
    _report(study.played.recipe, study.played.points, out)
    text = (out / "report.md").read_text()
    share = study.results.cells[0].scores["plug_in"].primary.value
    assert f"{100 * share:.1f} ± " in text
    for words in ("## Held-out accuracy", "higher is better", "against zero-shot, points", "9 test pictures"):
        assert words in text
    assert "labelled token" not in text
    assert "above 0 if the plug-in is better" in text
    assert [table.title for table in tables(study.results)][2] == "Held-out loss"
    found = json.loads((out / "results.json").read_text())
    assert found["primary"] == "accuracy"
    assert found["cells"][0]["scores"]["plug_in"]["primary"]["value"] == share
    with Image.open(out / "plots" / "predictions-colours.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 6 * 176
    assert "plots/predictions-colours.png" in text
    assert "predictions-colours.png" in capsys.readouterr().err


def test_a_study_of_pictures_stays_small(tmp_path: Path) -> None:
    """Nor may listing them take torch into the process from whose size a child's peak is counted."""
    file = lay_out(tmp_path, RECIPE.replace('base = "base"', 'base = "base"\nrows = ["zero_shot"]'))
    assert not HEAVY & modules_after("study", file, "--out", tmp_path / "out", "--json")
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "out" / "stages").iterdir()]
    assert 0 <= record["result"]["accuracy"] <= 1


def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    def refused(old: str, new: str) -> list[str]:
        with pytest.raises(UsageError) as caught:
            prepare(load_recipe(lay_out(tmp_path, RECIPE.replace(old, new))), tmp_path / "out", print)
        return list(caught.value.reasons)

    assert "no calibration pictures were named" in refused('calibration = "own"', "")[0]
    assert "pictures have no 'accuracy_norm'" in refused('name = "colours"', 'name = "c"\nscore = "accuracy_norm"')[0]
    assert "keep" in refused("keep = 1", "keep = 9")[0]
    with pytest.raises(IncompatibleError, match="not the base"):
        prepare(load_recipe(lay_out(tmp_path, f'architecture = "vit"\n{RECIPE}')), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()
