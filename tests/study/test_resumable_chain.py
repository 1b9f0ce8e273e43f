import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from offsite.errors import OffsiteError, UsageError, VerificationError
from offsite.progress import Event
from offsite.study import run_command as command
from offsite.study.resumable_chain import STATE, Chain, require_demo_folder
from offsite.training.run_log import Terminated, terminated_as_interrupted


class Work:
    """A chain of two steps, and what ran."""

    def __init__(self, folder: Path, stamp: str = "") -> None:
        self.ran: list[str] = []
        self.events: list[Event] = []
        self.chain = Chain(folder, self.events.append, 2)
        self.stamp = stamp

    def act(self, name: str, fail: bool = False) -> Callable[[], dict[str, str]]:
        def run() -> dict[str, str]:
            self.ran.append(name)
            if fail:
                raise KeyboardInterrupt
            self.chain.folder(name).write_text(name + self.stamp)
            return {"made": name}

        return run

    def go(self, fail: bool = False) -> list[str]:
        one, two = self.chain.folder("one"), self.chain.folder("two")
        self.chain.step("one", "the first", self.act("one"), [one], {"stamp": self.stamp})
        self.chain.step("two", "the second", self.act("two", fail), [two], {})
        return self.ran


def test_steps_run_once(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert work.go() == ["one", "two"]
    assert [(e.stage, e.done, e.total, e.facts["says"]) for e in work.events] == [
        ("one", 1, 2, "the first"),
        ("two", 2, 2, "the second"),
    ]
    again = Work(tmp_path)
    assert again.go() == []
    assert again.events == []
    assert again.chain.results == {"one": {"made": "one"}, "two": {"made": "two"}}
    assert again.chain.seconds == work.chain.seconds


def test_an_interrupted_step_runs_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Work(tmp_path).go(fail=True)
    assert Work(tmp_path).go() == ["two"]


def test_a_missing_output_is_made_again(tmp_path: Path) -> None:
    Work(tmp_path).go()
    (tmp_path / "two").unlink()
    assert Work(tmp_path).go() == ["two"]


def test_a_change_runs_all_that_follows(tmp_path: Path) -> None:
    Work(tmp_path).go()
    assert Work(tmp_path, "changed").go() == ["one", "two"]
    assert (tmp_path / "two").read_text() == "twochanged"


def test_another_program_starts_over(tmp_path: Path) -> None:
    Work(tmp_path).go()
    work = Work(tmp_path)
    work.chain = Chain(tmp_path, work.events.append, 2, basis="a newer version")
    assert work.go() == ["one", "two"]


def test_a_damaged_state_starts_over(tmp_path: Path) -> None:
    Work(tmp_path).go()
    (tmp_path / STATE).write_text("{")
    assert Work(tmp_path).go() == ["one", "two"]


def test_the_wire_copies(tmp_path: Path) -> None:
    chain = Chain(tmp_path, lambda _: None, 1)
    source = tmp_path / "a"
    source.mkdir()
    (source / "x").write_text("content")
    chain.copy("over", source, tmp_path / "b" / "a")
    assert (tmp_path / "b" / "a" / "x").read_text() == "content"


def replaced(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> list[list[str]]:
    """`python -m offsite ...` runs these scripts instead, one after another; returns the words that were given."""
    given: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> Any:
        given.append(list(command[3:]))
        return popen([sys.executable, "-c", scripts[len(given) - 1]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return given


def test_a_command_runs_with_the_home_of_its_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replaced(monkeypatch, "print('{\"x\": 1}')", "print('{}')", "print('{}')")
    chain = Chain(tmp_path, lambda _: None, 3)
    out = tmp_path / "model-owner" / "bundle"
    assert chain.command("pack", "", ["pack", "base", "--out", out], out) == {"x": 1}
    chain.command("tune", "", ["tune"], tmp_path / "data-owner" / "return")
    chain.command("eval", "", ["eval"])
    owner, tuner = tmp_path / "model-owner" / "home", tmp_path / "data-owner" / "home"
    assert given == [
        ["--home", str(owner), "pack", "base", "--out", str(out), "--json"],
        ["--home", str(tuner), "tune", "--json"],
        ["--home", str(owner), "eval", "--json"],
    ]


def test_a_second_try_says_so_and_finds_what_the_first_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replaced(monkeypatch, "import sys; sys.exit(130)", "print('{}')", "print('{}')")
    out, left = tmp_path / "return", tmp_path / "return.run"

    def go(*verb: str) -> bool:
        left.mkdir(exist_ok=True)
        chain = Chain(tmp_path, lambda _: None, 1)
        chain.command("tune", "", verb, out, again="--again", leftovers=[left])
        return left.exists()

    with pytest.raises(KeyboardInterrupt):
        go("tune")
    assert go("tune")
    assert not go("tune", "--lr", "1")  # another tuning must not resume the first one
    assert [words[2:] for words in given] == [
        ["tune", "--json"],
        ["tune", "--again", "--json"],
        ["tune", "--lr", "1", "--again", "--json"],
    ]


def test_a_failed_command_passes_its_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 9)")
    chain = Chain(tmp_path, lambda _: None, 1)
    with pytest.raises(OffsiteError, match="`offsite verify x` ended with exit code 3") as caught:
        chain.run(["verify", "x"])
    assert caught.value.exit_code == VerificationError.exit_code
    with pytest.raises(OffsiteError) as killed:
        chain.run(["verify", "x"])
    assert killed.value.exit_code == 1


_STUBBORN = "import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print(flush=True); time.sleep(60)"


@pytest.mark.parametrize(("handler", "code"), [("lambda *_: sys.exit(130)", 130), ("signal.SIG_IGN", -signal.SIGKILL)])
def test_an_interrupted_command_may_clean_up(handler: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "STOP_SECONDS", 0.5 if code < 0 else 30.0)
    script = _STUBBORN.format(handler=handler)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the handler is in place
        command.stop(process, signalled=False)
    assert process.returncode == code


def test_a_command_does_not_outlive_a_player_that_is_terminated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, told = tmp_path / "pid", tmp_path / "told"
    replaced(
        monkeypatch,
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(told)!r}, 'w').close(), sys.exit(130)))\n"
        f"with open({str(place)!r}, 'w') as file: file.write(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)",
    )
    monkeypatch.setattr("sys.stdin", Mock(isatty=lambda: True))  # which would have told it of Ctrl-C
    with terminated_as_interrupted(), pytest.raises(Terminated):
        command.run_command(["verify", "x"], "the demo")
    assert told.exists()  # and so could clean up
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    assert require_demo_folder(tmp_path / "new") == tmp_path / "new"
    assert require_demo_folder(tmp_path) == tmp_path
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="not of a demo"):
        require_demo_folder(tmp_path)
    (tmp_path / STATE).write_text(json.dumps({}))
    assert require_demo_folder(tmp_path) == tmp_path
