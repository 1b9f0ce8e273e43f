import json
from pathlib import Path

import pytest

from offsite import extras
from offsite.cli import main
from tiny import tiny_base, tiny_bundle, tiny_parties, tiny_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("eval") / "base", blocks=2)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.csv"
    file.write_text('question,choices,answer\nThe fox?,"[""jumps"", ""a lazy dog""]",0\nThe dog?,"[""x"", ""y""]",1\n')
    return file


def test_a_person_sees_figures_with_their_intervals(
    base: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(base), "--data", str(questions)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("loss", "perplexity", "completion loss", "accuracy", "accuracy norm"):
        figure, _, ends = lines[name].strip().partition("  ")
        low, high = ends.strip("[]").split(", ")
        assert float(low) <= float(figure) <= float(high), name
    assert not any("interval" in name for name in lines)


def test_a_script_sees_the_intervals_apart(base: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(base), "--data", str(questions), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["intervals"].keys() == {"loss", "perplexity", "completion_loss", "accuracy", "accuracy_norm"}
    for name, ends in result["intervals"].items():
        assert ends["low"] <= result[name] <= ends["high"]
    assert not {"row_losses", "choice_scores", "tasks"} & result.keys()


def test_nothing_to_score_on(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(base), "--tasks", " , "]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "x", "--samples", "2"], "--samples"),
        (["--tasks", "x", "--row-scores", "scores.jsonl"], "--row-scores"),
        (["--data", "rows.jsonl", "--tasks-path", "tasks"], "--tasks-path"),
        (["--data", "rows.jsonl", "--skip-bad"], "--skip-bad"),
        (["--data", "rows.jsonl", "--row-scores", "."], "is a folder"),
        (["--data", "rows.jsonl", "--row-scores", "../{here}/rows.jsonl"], "the rows themselves"),
    ],
)
def test_flags_of_no_use_or_of_harm_are_refused_before_any_work(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tiny_rows(tmp_path / "rows.jsonl", 1).read_bytes()
    monkeypatch.setattr("offsite.evaluation.evaluate.evaluate", None)  # not reached
    assert main(["eval", str(base), *(word.format(here=tmp_path.name) for word in words)]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_what_is_no_model_is_a_usage_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And who names an adapter alone is told to name it beside its model."""
    rows = tiny_rows(tmp_path / "rows.jsonl", 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert main(["eval", str(folder), "--data", str(rows)]) == 2
    assert "--adapter" not in capsys.readouterr().err
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert main(["eval", str(folder), "--data", str(rows)]) == 2
    assert f"`offsite eval MODEL --adapter {folder}`" in capsys.readouterr().err
    assert main(["eval", str(base), "--data", str(rows), "--adapter", str(tmp_path)]) == 2
    assert "not a LoRA adapter" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "extra"), [("eval", "lm-eval"), ("tune", "tensorboard")])
def test_a_missing_extra_is_named_before_any_work(
    verb: str,
    extra: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(module: str) -> object:
        if module.startswith("offsite."):
            return __import__(module, fromlist=["_"])
        raise ModuleNotFoundError(f"No module named {module!r}")

    words: list[object] = ["eval", base, "--tasks", "arc_easy"]
    if verb == "tune":
        parties = tiny_parties(tmp_path)
        bundle = tiny_bundle(base, tmp_path / "bundle", parties, bottom=1, top=0)
        rows = tiny_rows(tmp_path / "rows.jsonl", 3)
        words = ["tune", bundle.folder, "--data", rows, "--out", tmp_path / "return", "--home"]
        words += [parties.data_owner.folder, "--tensorboard", tmp_path / "board"]
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    assert main([str(word) for word in words]) == 2
    assert f"[{extra}]" in capsys.readouterr().err
    assert not (tmp_path / "return").exists()
