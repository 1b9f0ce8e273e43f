import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from offsite.errors import DataError, IncompatibleError, OffsiteError, UsageError
from offsite.evaluation.intervals import paired_interval
from offsite.evaluation.row_scores import read_row_scores
from offsite.model_owner.ledger import Ledger
from offsite.protocol.manifest import MANIFEST
from offsite.storage.files import sha256_of
from offsite.study.recipe import ROWS
from offsite.study.report.results import collect
from offsite.study.run_command import Outcome
from offsite.training.run_log import records
from studies import RECIPE, Played, Study, lay_out, played_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return played_study(lay_out(tmp_path_factory.mktemp("study")))


def test_stages_that_cells_share_run_once(study: Study) -> None:
    """Two data sets: one bundle and one uncompressed bundle for both, everything else twice."""
    counts = {verb: study.played.ran.count(verb) for verb in sorted(set(study.played.ran))}
    # tune, verify and plug-in: on the emulator and on the base; each bundle is verified once
    assert counts == {"pack": 2, "tune": 4, "verify": 2 + 4, "plug-in": 4, "full-fine-tuning": 2, "eval": 12}
    assert len(study.played.stages) == sum(counts.values())
    assert study.played.events[-1].done == study.played.events[-1].total == len(study.played.stages)


def test_an_unchanged_study_runs_nothing(study: Study) -> None:
    again = Played(study.folder / "recipe.toml", study.folder / "out")
    assert again.go() == 0
    assert again.ran == []
    assert collect(again.recipe, again.points, study.folder / "out") == study.results


@pytest.mark.parametrize(
    ("old", "new", "ran"),
    [
        ("rank = 2", "rank = 3", {"tune": 4, "verify": 4, "plug-in": 4, "eval": 6}),
        ("lr = 1e-3", "lr = 2e-3", {"full-fine-tuning": 2, "eval": 2}),
        ("keep = 2", "keep = 3", {"pack": 1, "tune": 2, "verify": 3, "plug-in": 2, "eval": 6}),
        ("max_test_rows = 6", "max_test_rows = 5",
         {"tune": 2, "verify": 2, "plug-in": 2, "full-fine-tuning": 1, "eval": 6}),
    ],
)  # fmt: skip
def test_a_change_runs_what_depends_on_it_and_no_more(
    study: Study, tmp_path: Path, old: str, new: str, ran: dict[str, int]
) -> None:
    changed = RECIPE.replace(old, new)
    shutil.copytree(study.folder / "base", tmp_path / "base")
    played = Played(lay_out(tmp_path, changed), study.folder / "out")
    known = {file.stem for file in (study.folder / "out" / "stages").iterdir()}
    new_stages = [stage for key, stage in played.stages.items() if key not in known]
    verbs = {"verify bundle": "verify", "verify return": "verify", "full fine-tuning": "full-fine-tuning"}
    found = [verbs.get(stage.name, stage.name) for stage in new_stages]
    assert {verb: found.count(verb) for verb in set(found)} == ran


def test_every_row_is_scored_on_the_same_rows(study: Study) -> None:
    for point in study.results.cells:
        assert list(point.scores) == list(ROWS)
        assert len({(score.rows, score.tokens) for score in point.scores.values()}) == 1
        losses = {row: score.loss.value for row, score in point.scores.items()}
        assert len(set(losses.values())) == len(ROWS)  # six models, and no two of them the same
        assert losses["full"] < losses["zero_shot"]
        assert losses["emulator"] < losses["emulator_zero_shot"]
    assert study.results.cells[0].scores["plug_in"].rows == 6


def test_figures_are_what_they_say(study: Study) -> None:
    point = study.results.cells[0]
    loss = {row: score.loss.value for row, score in point.scores.items()}
    assert point.gain_recovered is not None
    assert point.bound_recovered is not None
    assert point.plug_in_gap is not None
    gain = loss["plug_in"] - loss["zero_shot"]
    assert point.gain_recovered.value == pytest.approx(gain / (loss["full"] - loss["zero_shot"]))
    assert point.bound_recovered.value == pytest.approx(gain / (loss["adapter_on_base"] - loss["zero_shot"]))
    assert point.own_gain is not None
    own = loss["emulator"] - loss["zero_shot"]
    assert point.own_gain.value == pytest.approx(own / (loss["full"] - loss["zero_shot"]))
    assert point.plug_in_gap.value == pytest.approx(loss["plug_in"] - loss["emulator"])
    issued = Ledger(study.folder / "out" / "model-owner" / "home" / "ledger.sqlite").issued(
        sha256_of(study.played.points[0].pack.out / MANIFEST)
    )
    assert issued is not None
    assert issued.shares is not None
    assert point.base_parameters == pytest.approx(issued.shares.fractions, abs=1e-4)
    assert sum(point.base_parameters.values()) == pytest.approx(1, abs=1e-3)
    steps = list(records(study.folder / "out" / str(point.log), "step"))
    labelled = sum(step["labels"] for step in steps) / sum(step["tokens"] for step in steps)
    assert issued.arithmetic is not None
    assert point.arithmetic == pytest.approx(issued.arithmetic.share(labelled))
    rows = {row: read_row_scores(stage.out) for row, stage in study.played.points[0].rows.items()}
    ends = paired_interval(rows["plug_in"].nats, rows["zero_shot"].nats, rows["plug_in"].tokens)
    against = point.scores["plug_in"].against_zero_shot
    assert ends is not None
    assert against is not None
    assert (against.value, against.low, against.high) == (pytest.approx(gain), ends.low, ends.high)


def test_accuracy_stands_beside_the_loss(study: Study) -> None:
    prompts, choices = study.results.cells
    assert prompts.scores["plug_in"].accuracy is None
    score = choices.scores["plug_in"]
    assert score.accuracy is not None
    assert score.accuracy_stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 7))


def test_costs_are_of_the_protocol(study: Study) -> None:
    point = study.results.cells[0]
    assert [(one.stage, one.party) for one in point.spent] == [
        ("pack", "model-owner"),
        ("verify bundle", "data-owner"),
        ("tune", "data-owner"),
        ("verify return", "model-owner"),
        ("plug-in", "model-owner"),
    ]
    assert point.placement == "1-2-1"
    assert point.bundle_bytes is not None
    assert point.return_bytes is not None
    assert point.return_bytes < point.bundle_bytes
    assert point.log is not None
    assert (study.folder / "out" / point.log).is_file()


def test_the_parties_share_nothing_but_the_wire(study: Study) -> None:
    owner, tuner = study.folder / "out" / "model-owner", study.folder / "out" / "data-owner"
    assert not [path for path in owner.rglob("*.jsonl") if not path.name.endswith(".log.jsonl")]
    assert not (tuner / "home" / "ledger.sqlite").exists()
    assert (owner / "home" / "key.pem").read_bytes() != (tuner / "home" / "key.pem").read_bytes()
    point = study.played.points[0]
    pack, received = point.protocol[:2]
    sent = {path.name: path.read_bytes() for path in pack.out.iterdir()}
    assert sent == {path.name: path.read_bytes() for path in received.out.iterdir()}


def test_a_failed_stage_fails_its_cells_alone(tmp_path: Path) -> None:
    file = lay_out(
        tmp_path, RECIPE.replace('base = "base"', 'base = "base"\nrows = ["zero_shot", "emulator_zero_shot"]')
    )
    played = Played(file, tmp_path / "out")
    run = played.run

    def fail(words: list[str | Path], log: Path) -> object:
        if "pack" in words:
            raise OffsiteError("the disk is full", reasons=["by 1 byte"])
        return run(words, log)

    played.run = fail  # type: ignore[method-assign, assignment]
    assert played.go() == 2
    results = collect(played.recipe, played.points, tmp_path / "out")
    for point in results.cells:
        assert set(point.scores) == {"zero_shot"}
        assert point.errors == {"emulator_zero_shot": "the disk is full\n  - by 1 byte"}
    assert played.ran == ["eval", "eval"]
    again = Played(file, tmp_path / "out")
    assert again.go() == 0
    assert again.ran == ["pack", "verify", "eval", "eval"]  # zero-shot is known; the pack is tried again
    assert not any(point.errors for point in collect(again.recipe, again.points, tmp_path / "out").cells)


def test_without_full_fine_tuning_the_rest_is_there(tmp_path: Path) -> None:
    text = RECIPE.replace(RECIPE[RECIPE.index('[[data]]\nname = "choices"') : RECIPE.index("[[pack]]")], "")
    played = Played(lay_out(tmp_path, text), tmp_path / "out")
    run = played.run

    def fail(words: list[str | Path], log: Path) -> object:
        if "full-fine-tuning" in words:
            raise OffsiteError("no room for it")
        return run(words, log)

    played.run = fail  # type: ignore[method-assign, assignment]
    assert played.go() == 1
    (point,) = collect(played.recipe, played.points, tmp_path / "out").cells
    assert set(ROWS) - set(point.scores) == {"full"} == set(point.errors)
    assert point.gain_recovered is None
    assert point.own_gain is None
    assert point.bound_recovered is not None


def test_a_model_that_diverged_fails_its_row_alone(tmp_path: Path) -> None:
    text = RECIPE.replace('base = "base"', 'base = "base"\nrows = ["zero_shot", "emulator_zero_shot"]')
    played = Played(lay_out(tmp_path, text), tmp_path / "out")
    run = played.run

    def diverged(words: list[str | Path], log: Path) -> Outcome:
        outcome = run(words, log)
        bundle = any("bundles" in str(word) for word in words)
        return replace(outcome, result={**outcome.result, "loss": None}) if "eval" in words and bundle else outcome

    played.run = diverged  # type: ignore[method-assign]
    assert played.go() == 2
    for point in collect(played.recipe, played.points, tmp_path / "out").cells:
        assert set(point.scores) == {"zero_shot"}
        assert "not a finite number" in point.errors["emulator_zero_shot"]


def test_half_a_removed_model_does_not_pass_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = RECIPE.replace('base = "base"', 'base = "base"\nkeep_models = false\nrows = ["full"]')
    text = text.replace(text[text.index('[[data]]\nname = "choices"') : text.index("[[pack]]")], "")
    played = Played(lay_out(tmp_path, text), tmp_path / "out")

    rmtree = shutil.rmtree

    def stopped(folder: Path, **options: bool) -> None:
        if not folder.name.endswith(".removed"):
            rmtree(folder, **options)
            return
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("offsite.study.run_grid.shutil.rmtree", stopped)
        played.go()
    (tuned,) = (stage for stage in played.stages.values() if stage.large)
    assert not tuned.out.exists()


def test_an_interrupted_study_goes_on(tmp_path: Path) -> None:
    file = lay_out(
        tmp_path, RECIPE.replace('base = "base"', 'base = "base"\nrows = ["zero_shot", "emulator_zero_shot"]')
    )
    played = Played(file, tmp_path / "out")
    run = played.run

    def interrupt(words: list[str | Path], log: Path) -> object:
        if "verify" in words:
            raise KeyboardInterrupt
        return run(words, log)

    played.run = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        played.go()
    again = Played(file, tmp_path / "out")
    assert again.go() == 0
    assert again.ran == ["verify", "eval", "eval", "eval"]


def test_large_models_go_once_they_are_scored(tmp_path: Path) -> None:
    text = RECIPE.replace('base = "base"', 'base = "base"\nkeep_models = false\nrows = ["full", "plug_in"]')
    text = text.replace('method = "lora"\nrank = 2', 'method = "full"')
    text = text.replace(text[text.index('[[data]]\nname = "choices"') : text.index("[[pack]]")], "")
    played = Played(lay_out(tmp_path, text), tmp_path / "out")
    assert played.go() == 0
    assert not list((tmp_path / "out").rglob("plug-ins/*/config.json"))
    assert not list((tmp_path / "out").rglob("full/*/config.json"))
    again = Played(tmp_path / "recipe.toml", tmp_path / "out")
    assert again.go() == 0
    assert again.ran == []


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ('base = "base"', 'base = "base"\nblocks = 7', IncompatibleError, "6 blocks, the recipe says 7"),
        ('base = "base"', 'base = "base"\narchitecture = "gpt2"', IncompatibleError, "the recipe says gpt2"),
        ("keep = 2", "keep = 9", UsageError, "cannot keep 9 blocks of a middle of 4"),
        ("max_test_rows = 6", 'score = "accuracy"', DataError, "no multiple choice, which score = 'accuracy' needs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, old: str, new: str, error: type[OffsiteError], said: str
) -> None:
    with pytest.raises(error) as caught:
        Played(lay_out(tmp_path, RECIPE.replace(old, new)), tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out" / "stages").exists()


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="not of a study"):
        Played(lay_out(tmp_path), tmp_path / "out")


def test_rows_are_spread_over_the_file(tmp_path: Path) -> None:
    played = Played(lay_out(tmp_path, RECIPE.replace("max_test_rows = 6", "max_test_rows = 3")), tmp_path / "out")
    source = (tmp_path / "test.jsonl").read_text().splitlines()
    (file,) = (played.workspace.folder / "data-owner" / "data").glob("prompts.test.*.jsonl")
    taken = file.read_text().splitlines()
    assert [json.loads(line) for line in taken] == [json.loads(source[i]) for i in (0, 3, 6)]
