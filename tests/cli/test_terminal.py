import io
import json
import math
import re
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from offsite.cli import terminal
from offsite.cli.progress_bars import bars
from offsite.errors import VerificationError
from offsite.progress import Event


def test_plain_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = terminal.lines(lambda: now)
    for step in range(101):
        advance(Event("train", step, 100, {"loss": 1.5}))
        now += 0.5  # a tenth of the work takes 5 s
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "offsite: train 0/100  loss 1.5".replace("  ", " ")
    assert lines[-1].startswith("offsite: train 100/100")
    assert len(lines) == 11


def test_slow_work_says_something_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = terminal.lines(lambda: now)
    for step in range(10):
        advance(Event("train", step, 1000))
        now += 6
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_fast_work_says_little(capsys: pytest.CaptureFixture[str]) -> None:
    advance = terminal.lines(lambda: 0.0)
    for step in range(1001):
        advance(Event("hash", step, 1000))
    assert capsys.readouterr().err.splitlines() == ["offsite: hash 0/1000", "offsite: hash 1000/1000"]


def test_work_of_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.lines(lambda: 0.0)(Event("reading", 0))
    assert capsys.readouterr().err == "offsite: reading\n"


def test_not_a_terminal_means_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.showing_progress() as progress:
        progress(Event("pack", 1, 2))
    terminal.hint("nobody looks")
    captured = capsys.readouterr()
    assert captured.err == "offsite: pack 1/2\n"
    assert captured.out == ""


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with terminal.showing_progress() as progress:
        progress(Event("reading", 0))
        terminal.say("in between")
        progress(Event("train", 1, 2, {"loss": 1.25, "note": "[bold]x"}))
        progress(Event("train", 2, 2, {"loss": 1.25, "note": "[bold]x"}))
    terminal.hint("do this next")
    err = capsys.readouterr().err
    assert "reading" in err
    assert "2/2" in err
    assert "\x1b[2Koffsite: in between" in err  # on a line of its own, above the bars
    assert "loss 1.25" in err
    assert "[bold]x" in err  # facts are text, not markup
    assert "offsite: do this next" in err


def test_a_bar_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's name may look like markup of rich, or hold control characters."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with terminal.showing_progress() as progress:
        progress(Event("reading a[/b]\x1b]0;title\x07", 1, 2, {"model": "c[red]\x1b[2J"}))
    err = capsys.readouterr().err
    assert "reading a[/b]\\x1b]0;title\\x07" in err
    assert "c[red]" in err
    assert "\x1b]0;" not in err
    assert "\x07" not in err


@pytest.mark.parametrize("facts", [{"left": "1:23"}, {}])
def test_bars_fit_into_80_columns_with_the_time_left(facts: dict[str, Any]) -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    loss = {"loss": 6.276, "lr": 0.00025, "tokens/s": 12345}
    with bars(console) as progress:
        for done in (1, 2, 3):
            progress(Event("hidden states of the base to distill from, pass 2 of 3", done, 12345, {**loss, **facts}))
            time.sleep(0.01)
    lines = [re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", written.getvalue())]
    shown = [line for line in lines if "12345" in line]
    assert shown
    assert all(len(line) <= 80 for line in shown)
    assert all(" left" in line and "loss 6.276" in line for line in shown[-1:])
    assert ("1:23 left" in shown[-1]) is bool(facts)


def test_long_results_are_summarised(capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"part-{number}": number for number in range(50)}
    terminal.show({"blocks": [*range(40), 45, 46], "files": files, "odd": [3, 1, 2]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["blocks", "0-39, 45-46"]
    assert len(lines) == 1 + 20 + 1 + 1
    assert lines[-2].split(maxsplit=1) == ["files", "and 30 more (--json lists all)"]
    assert lines[-1].split(maxsplit=1) == ["odd", "3, 1, 2"]  # no order to shorten


def test_a_result_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(
        {
            "kind": "bundle",
            "bytes": 3 * 2**20,
            "verified": False,
            "reasons": ["the first reason", "the second reason"],
            "methods": ["lora", "full"],
            "may_come_back": {"blocks": [0, 1], "max_rank": 1024},
            "lora": None,
            "nothing": [],
            "files": {"generation_config.json": 1},
            "loss": 1.23456,
            "samples": [{"prompt": "p", "answer": "a"}],
            "many": [str(i) for i in range(20)],
        }
    )
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    assert lines["bytes"] == "3,145,728 (3.0 MiB)"
    assert lines["verified"] == "no"
    assert lines["may come back.blocks"] == "0, 1"
    assert lines["may come back.max_rank"] == "1,024"
    assert lines["loss"] == "1.235"
    assert lines["samples.prompt"] == "p"
    assert lines["many"].endswith("10, 11, and 8 more")
    assert lines["methods"] == "lora, full"
    assert lines["reasons"] == "the first reason"
    assert lines[""] == "the second reason"
    assert lines["files.generation_config.json"] == "1"
    assert not {"lora", "nothing"} & set(lines)


def test_json_is_strict() -> None:
    value = {"perplexity": math.inf, "rows": [{"loss": math.nan}, (1.5, True)], "name": "x"}
    assert json.loads(terminal.render_json(value)) == {
        "perplexity": None,
        "rows": [{"loss": None}, [1.5, True]],
        "name": "x",
    }


def test_no_text_writes_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "x\nerror: pay here\r\x1b[2J\u202e"
    error = VerificationError(hostile, reasons=[hostile], next_step=hostile)
    terminal.show_error(error, as_json=False)
    terminal.show({"name": hostile, "list": [hostile], "inner": {hostile: 1}})
    terminal.say(hostile)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert len(said.out.splitlines()) == 3
    assert len(said.err.splitlines()) == 4
    assert str(error).count("\n") == 2  # as Python prints it
    assert terminal.in_margin("a\nb\x1b") == "a\n  | b\\x1b"
