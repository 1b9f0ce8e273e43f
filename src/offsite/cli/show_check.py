"""Prints the result of --check: figures of each data set, and three rows with the labelled parts marked; or JSON."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from offsite.cli import terminal
from offsite.errors import one_line

if TYPE_CHECKING:
    from offsite.data.check_data import PictureCheck, ShownRow, TextCheck

    Checks = Mapping[str, TextCheck | PictureCheck]

_MOST_LETTERS = 2000  # most characters of a row that are printed, from its beginning and its end
_BEGIN, _END = "⟦", "⟧"  # around labelled text, if the output has no colour
_CLASSES_SHOWN = 20


def show_checks(checks: "Checks", *, as_json: bool) -> int:
    """Print the checks of data sets on standard output; returns the exit code, 2 if a run would refuse a data set."""
    if as_json:
        terminal.show({"kind": "check", **{name: _facts(check) for name, check in checks.items()}}, as_json=True)
    else:
        for check in checks.values():
            for line in _lines(check):
                typer.echo(line)
            typer.echo("")
        terminal.say("everything was read; nothing was trained or written")
    refused = [check for check in checks.values() if check.refused]
    for check in refused:
        terminal.say(
            f"rows of {check.data} are too long, and a run would refuse them: give --long-rows skip or "
            "--long-rows truncate, or raise --max-length"
        )
    if not refused:
        terminal.hint("next: the same command without --check")
    return 2 if refused else 0


def _facts(check: "TextCheck | PictureCheck") -> dict[str, Any]:
    """A check as values that JSON can hold."""
    facts = dataclasses.asdict(check)
    for row in facts["shown"]:
        if "pieces" in row:
            row["pieces"] = [{"text": text, "learnt": learnt} for text, learnt in row["pieces"]]
    return facts


def _lines(check: "TextCheck | PictureCheck") -> Iterator[str]:
    """Yield the lines of text for a check: its figures, then its examples of rows or pictures."""
    from offsite.data.check_data import PictureCheck

    facts = dataclasses.asdict(check)
    if isinstance(check, PictureCheck):
        listed = list(check.classes.items())
        more = f" and {len(listed) - _CLASSES_SHOWN} more" if len(listed) > _CLASSES_SHOWN else ""
        facts["classes"] = ", ".join(f"{name} ({count})" for name, count in listed[:_CLASSES_SHOWN]) + more
    else:
        facts["lengths"] = ", ".join(f"{name} {count}" for name, count in check.lengths.items())
        facts["learnt tokens"] = facts.pop("learnt_tokens")
        facts["left out by the chat template"] = _counts(facts.pop("dropped"))
        facts["note"] = _counts(facts.pop("notes"))
    shown = {
        name: value for name, value in facts.items() if name not in ("shown", "refused") and value not in ("", None)
    }
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        yield one_line(f"{name.replace('_', ' '):<{width}}  {text}")
    if isinstance(check, PictureCheck):
        for picture in check.shown:
            yield "\n" + one_line(f"{picture.name}: {picture.label}, {picture.height} x {picture.width} pixels")
        return
    for row in check.shown:
        yield "\n" + one_line(f"{row.place}: {row.tokens:,} tokens, {row.learnt:,} of them learnt")
        yield _marked(row)


def _counts(named: Mapping[str, int]) -> str:
    """Counts as text, such as "a (3), b (1)"."""
    return ", ".join(f"{name} ({count})" for name, count in sorted(named.items()))


def _marked(row: "ShownRow") -> str:
    """The text of a row of the data set, with labelled (learnt) parts in colour on a terminal, else in brackets."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    left = _MOST_LETTERS // max(1, len(row.pieces))
    text = ""
    for piece, learnt in row.pieces:
        short = terminal.in_margin(_shortened(piece, max(left, 80)))
        if learnt:
            short = typer.style(short, fg="green", bold=True) if coloured else f"{_BEGIN}{short}{_END}"
        text += short
    return text


def _shortened(text: str, most: int) -> str:
    """A text of at most about `most` characters, with the middle left out."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} [... {len(text) - most // 2 * 2:,} letters ...] {text[-(most // 2) :]}"
