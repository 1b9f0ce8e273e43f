import json
import os
import signal
from pathlib import Path

import pytest

from offsite.cli import keys, main, terminal
from offsite.errors import (
    DataError,
    IncompatibleError,
    OffsiteError,
    PolicyError,
    StorageError,
    UsageError,
    VerificationError,
)


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
    assert "--epochs and --max-steps were both given" in capsys.readouterr().err


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


def test_interrupted_tune_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from offsite.cli import data_owner

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_owner.flags, "settings", interrupt)
    assert main(["tune", "b", "--data", "d", "--out", "o"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_termination_is_an_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("offsite.cli.settle_waiting", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["inspect", "x"]) == 130
    assert "nothing half-written was left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(VerificationError("it broke", reasons=["\x1b[2Jfile is not listed"]))
    main(["keygen", "--out", "x"])
    assert "\\x1b[2Jfile" in capsys.readouterr().err
    assert terminal.printable("a\u202eb\r\n") == "a\\u202eb\\r\n"
