import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offsite.cli import data_owner, keys, main, terminal
from offsite.errors import (
    DataError,
    IncompatibleError,
    OffsiteError,
    PolicyError,
    StorageError,
    UsageError,
    VerificationError,
)
from offsite.training.resume_points import RunState
from offsite.training.run_log import run_folder

Process = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def offsite_process(tmp_path: Path) -> Process:
    """The command line in a process of its own, in an empty home, after some code of the test's."""

    def run(before: str, *words: str, stdout: Any = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
        code = f"{before}\nimport sys\nfrom offsite.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, *words]
        home = os.environ | {"OFFSITE_HOME": str(tmp_path / "home")}
        return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=home)

    return run


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`offsite keygen` raises what the test puts in."""
    errors: list[BaseException] = []

    def fail(*_: object) -> None:
        raise errors[0]

    monkeypatch.setattr(keys.flags, "home_of", fail)
    return errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OffsiteError, 1),
        (StorageError, 1),
        (UsageError, 2),
        (DataError, 2),
        (VerificationError, 3),
        (IncompatibleError, 4),
        (PolicyError, 5),
    ],
)
def test_an_error_is_one_screen_and_an_exit_code(
    error: type[OffsiteError], code: int, failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(error("it broke", reasons=["found 1, expected 2", "and more"], next_step="mend it"))
    assert main(["keygen", "--out", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: it broke\n  - found 1, expected 2\n  - and more\nnext: mend it\n"


def test_an_error_is_json_too(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing.append(VerificationError("it broke", reasons=["why"], next_step="mend it"))
    assert main(["keygen", "--out", "x", "--json"]) == 3
    captured = capsys.readouterr()
    body = {"kind": "VerificationError", "exit_code": 3, "what": "it broke", "reasons": ["why"], "next_step": "mend it"}
    assert json.loads(captured.out) == {"error": body}
    assert "it broke" in captured.err


def test_what_is_no_error_of_ours_is_not_caught(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("a mistake of ours"))
    with pytest.raises(ZeroDivisionError):
        main(["keygen", "--out", "x"])


@pytest.mark.parametrize("words", [["pack"], ["nothing"], ["pack", "x", "--nope"], ["--nope"]])
def test_what_the_parser_refuses_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == 2
    assert captured.err.startswith("error: ")
    assert "next: see `offsite" in captured.err


def test_every_wrong_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "b", "--out", "o", "--for", "x", "--bottom", "-3", "--select", "foo", "--json"]) == 2
    reasons = json.loads(capsys.readouterr().out)["error"]["reasons"]
    assert [reason.split(":")[0] for reason in reasons] == ["bottom", "select"]


def test_epochs_and_steps_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "b", "--data", "d", "--out", "o", "--epochs", "1", "--max-steps", "2"]) == 2
    assert "epochs and max_steps were both given" in capsys.readouterr().err


def test_settings_come_from_toml_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "settings.toml"
    config.write_text('[pack]\nkeep = 0\nselect = "foo"\n[tune]\nrank = 4\n')
    assert main(["pack", "b", "--out", "o", "--for", "x", "--keep", "3", "--config", str(config), "--json"]) == 2
    reasons = json.loads(capsys.readouterr().out)["error"]["reasons"]
    assert [reason.split(":")[0] for reason in reasons] == ["select"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["keygen", "--out", "x"], "Run the same command again to start over"), (["--home", "h"], "")],
)
def test_interruption(
    words: list[str], expected: str, failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(KeyboardInterrupt())
    code = main(words)
    captured = capsys.readouterr()
    if expected:
        assert code == 130
        assert "nothing half-written was left" in captured.err
        assert expected.lower() in captured.err.lower()
    else:
        assert code == 2  # a home and no verb


def test_interruption_is_json_too(failing: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing.append(KeyboardInterrupt())
    assert main(["keygen", "--out", "x", "--json"]) == 130
    error = json.loads(capsys.readouterr().out)["error"]
    assert set(error) == {"kind", "exit_code", "what", "reasons", "next_step"}
    assert (error["kind"], error["exit_code"]) == ("Interrupted", 130)


@pytest.mark.parametrize("out", ["{here}/out", "."])
@pytest.mark.parametrize("words", [["tune", "b", "--data", "d"], ["pack", "b", "--for", "x"]])
def test_what_can_be_resumed_is_resumed_and_what_was_not_begun_is_not(
    words: list[str], out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_owner.flags, "settings", interrupt)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    words = [*words, "--out", out.format(here=tmp_path)]
    assert main(words) == 130
    assert "Run the same command again to start over" in capsys.readouterr().err
    RunState(run_folder(tmp_path / "out"), {}, resume=False)
    assert main(words) == 130
    assert "Run the same command with --resume" in capsys.readouterr().err


def test_interruption_before_the_commands_are_there(offsite_process: Process) -> None:
    """Importing them takes a fifth of a second, in which a person may change their mind."""
    stop = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name == "typer":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
"""
    done = offsite_process(stop, "inspect", "x", "--json")
    assert done.returncode == 130
    assert done.stderr.startswith("offsite: stopped")
    assert json.loads(done.stdout)["error"]["exit_code"] == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("words", [["trust", "list"], ["inspect", "nothing"], ["--help"]])
def test_standard_output_that_takes_nothing(words: list[str], offsite_process: Process) -> None:
    with Path("/dev/full").open("w") as full:
        done = offsite_process("", *words, *([] if "--help" in words else ["--json"]), stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "error: cannot use standard output: No space left on device",
        "next: check the disk and the path, then run the same command again",
    ]
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_is_no_error(offsite_process: Process) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = offsite_process("", "trust", "list", "--json", stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("wanted", [True, False])
def test_colour_is_left_out_where_it_is_not_wanted(
    wanted: bool,
    failing: list[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "" if wanted else "1")
    failing.append(UsageError("it broke", next_step="mend it"))
    assert main(["keygen", "--out", "x"]) == 2
    assert ("\x1b[" in capsys.readouterr().err) == wanted


def test_termination_is_an_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(keys.flags, "home_of", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["keygen", "--out", "x"]) == 130
    assert "nothing half-written was left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(VerificationError("it broke", reasons=["\x1b[2Jfile is not listed"]))
    main(["keygen", "--out", "x"])
    assert "\\x1b[2Jfile" in capsys.readouterr().err
    assert terminal.printable("a\u202eb\r\n") == "a\\u202eb\\r\n"
