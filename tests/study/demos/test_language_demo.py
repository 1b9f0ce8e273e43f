"""The whole chain on a tiny random model and a small code base: as real processes until it is interrupted.

What follows runs in this process, with the words that each process would have; with --every-form as processes, too.
"""

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import main
from offsite.cli.study import run_in_this_process
from offsite.study.demos.language_demo import ROWS
from offsite.study.resumable_chain import Chain
from tiny import tiny_base

STEPS = 3


@dataclass(frozen=True)
class Played:
    """A demo that was interrupted, run again, and run once more with --full."""

    workdir: Path
    words: list[str]
    interrupted: "subprocess.CompletedProcess[str]"
    result: dict[str, Any]
    full: dict[str, Any]


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("demo")
    base = tiny_base(folder / "model", blocks=13, max_position_embeddings=512)
    code = folder / "code"
    code.mkdir()
    for m in range(12):
        functions = (
            f'def sum_{m}_{f}(xs):\n    """Sum up list {m}, {f} times."""\n    start = {f}\n    return sum(xs, start)\n'
            for f in range(8)
        )
        (code / f"module_{m}.py").write_text("".join(functions))
    workdir, result = folder / "work", folder / "result.json"
    words = ["demo", "--model", str(base), "--data", str(code), "--workdir", str(workdir), "--steps", str(STEPS)]
    words += ["--json", str(result)]
    # later than the imports of a process: libraries print what stopped theirs
    interrupted = _interrupted_at("healing by refit", words)
    with pytest.MonkeyPatch.context() as patched:
        if not request.config.option.every_form:
            patched.setattr(Chain, "run", lambda _, given: run_in_this_process(given, folder / "log.txt").result)
        assert main(words) == 0
        first = json.loads(result.read_text())
        assert main([*words, "--full"]) == 0
    return Played(workdir, words, interrupted, first, json.loads(result.read_text()))


def _interrupted_at(line: str, words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run until a line appears, then press Ctrl-C.

    A shell without job control starts what it puts into the background deaf to Ctrl-C, and children inherit that; of a
    signal that this process handles they inherit nothing.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(
            [sys.executable, "-m", "offsite", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with started as process:
        assert process.stderr is not None
        seen = ""
        for said in process.stderr:
            if line in said and line not in seen:
                process.send_signal(signal.SIGINT)
            seen += said
        out = process.stdout.read() if process.stdout else ""
    return subprocess.CompletedProcess(words, process.returncode, out, seen)


def test_an_interrupted_demo_says_how_to_continue(played: Played) -> None:
    assert played.interrupted.returncode == 130
    assert played.interrupted.stderr.rstrip().endswith("finished steps are not repeated")
    assert "Traceback" not in played.interrupted.stderr


def test_every_row_was_scored_on_the_same_tokens(played: Played) -> None:
    assert [row["name"] for row in played.result["rows"]] == [
        "zero-shot",
        "emulator zero-shot",
        "emulator",
        "plug-in",
    ]
    assert [row["name"] for row in played.full["rows"]] == list(ROWS)
    assert len({(row["tokens"], row["rows"], row["skipped"]) for row in played.full["rows"]}) == 1
    for row in played.full["rows"]:
        assert math.isfinite(row["loss"])
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    losses = {row["name"]: row["loss"] for row in played.full["rows"]}
    assert losses["emulator"] < losses["emulator zero-shot"]
    assert losses["full fine-tuning"] < losses["zero-shot"]
    assert losses["adapter on base"] < losses["zero-shot"]
    assert len(set(losses.values())) == len(losses)  # six models, and no two of them the same


def test_the_result_has_what_a_report_needs(played: Played) -> None:
    assert {"import", "pack", "tune", "plug-in", "eval zero-shot", "eval plug-in"} <= set(played.result["seconds"])
    sizes = played.result["bytes"]
    assert set(sizes) == {"base", "bundle", "return", "plug-in"}
    assert sizes["return"] < sizes["bundle"] < sizes["base"]
    assert set(played.result["sample"]) == {"prompt", "reference", "zero-shot", "plug-in"}
    assert played.result["sample"]["prompt"].startswith("def sum_")
    assert played.result["settings"]["split"] == {"bottom": 2, "emulator": 8, "top": 3}
    assert played.result["task"]["train_modules"] + played.result["task"]["test_modules"] == 12
    assert sum(played.result["base_parameters"].values()) == pytest.approx(1, abs=1e-3)


def test_gains_are_those_of_the_rows(played: Played) -> None:
    loss = {row["name"]: row["loss"] for row in played.full["rows"]}
    gains, without = played.full["gains"], played.result["gains"]
    assert gains["plug_in"] == pytest.approx(loss["zero-shot"] - loss["plug-in"])
    assert gains["emulator"] == pytest.approx(loss["zero-shot"] - loss["emulator"])
    assert gains["gain_recovered"] == pytest.approx(gains["plug_in"] / gains["full"])
    assert gains["own_gain"] == pytest.approx(gains["emulator"] / gains["full"])
    assert without == {**gains, "full": None, "gain_recovered": None, "own_gain": None}


def test_the_parties_share_nothing_but_the_wire(played: Played) -> None:
    """Separate homes and folders: the data owner has no base, the model owner no rows, and neither the other's key."""
    owner, tuner = played.workdir / "model-owner", played.workdir / "data-owner"
    assert {path.name for path in tuner.iterdir()} >= {"home", "bundle", "return", "train.jsonl", "test.jsonl"}
    assert not (tuner / "base").exists()
    assert not [path for path in owner.rglob("*.jsonl") if not path.name.endswith(".log.jsonl")]
    assert (owner / "home" / "key.pem").read_bytes() != (tuner / "home" / "key.pem").read_bytes()
    assert not (tuner / "home" / "ledger.sqlite").exists()
    for name in ("bundle", "return"):
        sent = {path.name: path.read_bytes() for path in (owner / name).iterdir()}
        assert sent == {path.name: path.read_bytes() for path in (tuner / name).iterdir()}


def test_running_again_repeats_nothing(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*played.words, "--full"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    again = json.loads((played.workdir.parent / "result.json").read_text())
    assert again["rows"] == played.full["rows"]
    for name in ROWS:
        assert f" {name} " in captured.out
    assert "Before: the base model" in captured.out
    assert "After: the plug-in" in captured.out
    assert "Where to look next" in captured.out
    assert captured.out.count("The plug-in is ") == 2
    for said in ("share of gain", "Gain recovered: ", "Emulator's own gain: ", "Of the base's parameters"):
        assert said in captured.out


def test_steps_are_counted(played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[n/total] is announced for every step, and the last one is n = total."""
    from offsite.study import resumable_chain as chain
    from offsite.study.demos import language_demo

    announced: list[str] = []
    for full in (False, True):
        monkeypatch.setattr(chain.Chain, "run", _canned(played))
        monkeypatch.setattr(
            language_demo.Chain, "copy", lambda self, name, source, target: self.step(name, "", dict, [], {})
        )
        events: list[Any] = []
        language_demo.demo(
            tmp_path / str(full),
            model=played.workdir / "model-owner" / "base",
            data=Path(played.words[played.words.index("--data") + 1]),
            full=full,
            progress=events.append,
        )
        assert [event.done for event in events] == list(range(1, events[-1].total + 1))
        announced.append(str(events[-1].total))
    assert announced == ["19", "27"]


def _canned(played: Played) -> Any:
    """Commands that do nothing but give the results of the demo that was played."""
    steps = json.loads((played.workdir / "stages.json").read_text())

    def run(self: Any, words: list[Any]) -> Any:
        verb = next(
            str(word)
            for word in words
            if str(word) in ("import", "pack", "tune", "plug-in", "eval", "verify", "keygen", "trust")
        )
        if verb == "import":
            source = played.workdir / "model-owner" / "base"
            target = Path(words[-1])
            target.mkdir(parents=True)
            (target / "config.json").write_bytes((source / "config.json").read_bytes())
        found: Any = steps.get({"eval": "eval zero-shot"}.get(verb, verb), {"result": {}})["result"]
        return found

    return run


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--model", str(tmp_path / "nothing"), "--workdir", str(tmp_path / "work")]
    (tmp_path / "nothing").mkdir()
    assert main(words) == 2
    err = capfd.readouterr().err
    assert "is no model" in err  # the command's own words, passed through
    assert re.search(r"the demo stopped: `offsite --home .* import .*` ended with exit code 2", err)


def test_too_little_code_is_said_before_anything_is_packed(
    played: Played, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    base = played.workdir / "model-owner" / "base"
    words = ["demo", "--model", str(base), "--workdir", str(tmp_path / "work"), "--data", str(tmp_path / "code")]
    assert main(words) == 2
    assert "too few documented functions" in capfd.readouterr().err
    assert not (tmp_path / "work" / "model-owner" / "bundle").exists()
