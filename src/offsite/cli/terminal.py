"""Prints for people and scripts: results to standard output; progress, hints and errors to standard error.

Text in an artifact may be hostile, so control characters and its line ends are printed as escapes: no text of the other
party can move the cursor, or look like a line of this program.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer

from offsite.errors import OffsiteError, StorageError, one_line
from offsite.progress import NOTE, Event, Progress

INTERRUPTED = 130
START_OVER = "run the same command again to start over"
MARGIN = "\n  | "  # before the further lines of a text
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_AT_LEAST = 2.0
_LIST_SHOWN = 12
_ENTRIES_SHOWN = 20  # of a result's part, so that a result fits on a screen or two
_REMARKS = (NOTE, "kernels: ", "traps: ")  # how the stages of events begin that are printed as a line


def show(result: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print a result on standard output: JSON, or lines of name and value."""
    if as_json:
        typer.echo(render_json(result))
        return
    rows = list(_rows(result))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(one_line(f"{name:<{width}}  {value}"))


def render_json(value: object) -> str:
    """Render strict JSON: infinite and NaN values become null."""

    def strict(part: object) -> object:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, Mapping):
            return {name: strict(inner) for name, inner in part.items()}
        return [strict(inner) for inner in part] if isinstance(part, list | tuple) else part

    return json.dumps(strict(value), indent=2, allow_nan=False)


def say(text: str) -> None:
    """Print a line on standard error."""
    # rich redirects it above the bars; typer.echo would break them
    sys.stderr.write(one_line(f"offsite: {text}") + "\n")


def hint(text: str) -> None:
    """Print advice on the next step on standard error, if that is a terminal."""
    if sys.stderr.isatty():
        say(text)


def hint_command(*words: object) -> None:
    """Print the next command to type, as `hint` does; paths among the words are quoted where a shell needs it."""
    hint(f"next: {shlex.join(str(word) for word in ('offsite', *words))}")


def show_error(error: OffsiteError, *, as_json: bool) -> None:
    """Print an error: what was wrong, every reason, and the advice what to do next."""
    _failed(type(error).__name__, error.exit_code, error.what, error.reasons, error.next_step, as_json=as_json)


def show_usage_error(error: typer.TyperException, words: Sequence[str], *, as_json: bool) -> None:
    """Print the error of a flag or argument that the parser refused.

    Args:
        error: the parser's error.
        words: the command line; a file in it whose name begins with a dash looks like a flag.
        as_json: whether the result is JSON.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return
    context = getattr(error, "ctx", None)
    next_step = f"see `{context.command_path} --help`" if context is not None else "see `offsite --help`"
    if named := next((word for word in words if word.startswith("-") and os.path.lexists(word)), None):
        next_step = f"write {shlex.quote(f'./{named}')} for the file or folder {named}"
    _failed("UsageError", error.exit_code, error.format_message(), (), next_step, as_json=as_json)


def show_interruption(next_step: str, *, as_json: bool) -> int:
    """Print that the command was interrupted, and the advice `next_step`; returns the exit code."""
    what = "stopped; nothing half-written was left"
    say(f"{what}. {next_step[0].upper()}{next_step[1:]}")
    if as_json:
        _show_failure("Interrupted", INTERRUPTED, what, (), next_step)
    return INTERRUPTED


def show_system_error(error: OSError, *, as_json: bool) -> int:
    """Print an error of the operating system, mostly that standard output cannot be written; returns the exit code."""
    if error.filename is None:
        as_json = False
        with contextlib.suppress(OSError):  # else Python would try again at its end to write the remaining output
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    if error.errno != errno.EPIPE:  # no message if the reading program has ended, such as `head`
        what = f"cannot use {error.filename or 'standard output'}: {error.strerror or error}"
        next_step = "check the disk and the path, then run the same command again"
        show_error(StorageError(what, next_step=next_step), as_json=as_json)
    return StorageError.exit_code


def _failed(
    kind: str, exit_code: int, what: str, reasons: tuple[str, ...], next_step: str | None, *, as_json: bool
) -> None:
    """Print an error on standard error, and with `as_json` also as JSON on standard output.

    Args:
        kind: the name of the error's class.
        exit_code: the exit code of the command.
        what: what was wrong.
        reasons: further lines, one for each problem.
        next_step: advice what to do next; None if there is none.
        as_json: whether the result is JSON.
    """
    _mark("error: ", fg="red", bold=True)
    typer.echo(one_line(what), err=True)
    for reason in reasons:
        typer.echo(one_line(f"  - {reason}"), err=True)
    if next_step:
        _mark("next: ", fg="cyan")
        typer.echo(one_line(next_step), err=True)
    if as_json:  # last, since writing to standard output may fail
        _show_failure(kind, exit_code, what, reasons, next_step)


def _show_failure(kind: str, exit_code: int, what: str, reasons: tuple[str, ...], next_step: str | None) -> None:
    """Print an error as JSON on standard output; arguments as for `_failed`."""
    body = {"kind": kind, "exit_code": exit_code, "what": what, "reasons": list(reasons), "next_step": next_step}
    show({"error": body}, as_json=True)


def _mark(word: str, **style: Any) -> None:
    """Print the first word of a line on standard error, in colour unless $NO_COLOR is set (see no-color.org)."""
    typer.secho(word, err=True, nl=False, color=False if os.environ.get("NO_COLOR") else None, **style)


def printable(text: str) -> str:
    """A text of this program that has several lines: every control character except the line ends is escaped."""
    return "\n".join(map(one_line, text.split("\n")))


def in_margin(text: str) -> str:
    """A text of several lines, each but the first behind a margin, so that none looks like a line of this program."""
    return MARGIN.join(map(one_line, text.split("\n")))


def _rows(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (label, text) lines for a result; labels of nested entries have the outer name and a dot before them.

    `prefix` is that outer name with its dot; empty for the outermost entries.
    """
    for name, value in result.items():
        # below the top level, names may come from the other party and stay unchanged
        label = f"{prefix}{name}" if prefix else name.replace("_", " ")
        if isinstance(value, Mapping):
            shown = dict(itertools.islice(value.items(), _ENTRIES_SHOWN))
            yield from _rows(shown, f"{label}.")
            if len(value) > _ENTRIES_SHOWN:
                yield label, f"and {len(value) - _ENTRIES_SHOWN} more (--json lists all)"
        elif isinstance(value, list | tuple):
            yield from _list_rows(label, value)
        elif value is not None:
            yield label, _value(name, value)


def _list_rows(label: str, values: "list[Any] | tuple[Any, ...]") -> Iterator[tuple[str, str]]:
    """Yield (label, text) lines for a list: words and numbers in one line, sentences in a line each.

    Only the first line has the label.
    """
    numbers = len(values) > _LIST_SHOWN and all(isinstance(value, int) for value in values)
    if numbers and list(values) == sorted(set(values)):
        values = number_ranges(values)
    most = _LIST_SHOWN
    for value in values[:most]:
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}.")
    texts = [str(value) for value in values[:most] if not isinstance(value, Mapping)]
    words = not any(" " in text for text in texts)
    texts += [f"and {len(values) - most} more"] if len(values) > most else []
    for at, text in enumerate([", ".join(texts)] if texts and words else texts):
        yield "" if at else label, text


def number_ranges(numbers: Sequence[int]) -> list[str]:
    """Format ascending numbers as ranges, such as ["0-1", "10-11"]."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and pieces[-1][-1] == number - 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return [f"{piece[0]}-{piece[-1]}" if len(piece) > 1 else str(piece[0]) for piece in pieces]


def _value(name: str, value: object) -> str:
    """A value as text; a number named "bytes" also in MiB."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "bytes" and isinstance(value, int):
        return f"{value:,} ({value / 2**20:.1f} MiB)"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def silent(quiet: bool) -> Iterator[None]:
    """Context manager: if `quiet`, what its body prints is dropped, as of all processes of a run but the first."""
    if not quiet:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123  a device
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def showing_progress() -> Iterator[Progress]:
    """Context manager: yield a progress callback that shows bars on a terminal, and otherwise prints lines.

    Notes and the line about the kernels are printed as lines of their own, and not as stages of the work.
    """
    if not sys.stderr.isatty():
        yield _with_remarks(lines())
        return
    from offsite.cli.progress_bars import bars  # rich takes a while to import

    with bars() as progress:
        yield _with_remarks(progress)


def _with_remarks(progress: Progress) -> Progress:
    """A progress callback that prints notes and the line about the kernels; all other events go to `progress`."""

    def advance(event: Event) -> None:
        if event.stage.startswith(_REMARKS):
            say(event.stage)
        else:
            progress(event)

    return advance


def lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Make a progress callback that prints plain lines.

    It prints the first and last event of a stage, and between them a line for each 10 % or 10 seconds.

    Args:
        clock: returns the time in seconds.
    """
    printed: dict[str, tuple[float, int]] = {}  # by stage, the time of the last line and how many tenths were done

    def advance(event: Event) -> None:
        now = clock()
        tenths = 10 * event.done // event.total if event.total else 0
        before = printed.get(event.stage)
        if before is not None:
            waited = now - before[0]
            due = waited >= _SECONDS_BETWEEN_LINES or (tenths > before[1] and waited >= _SECONDS_AT_LEAST)
            finished = event.done == event.total and before[1] < 10
            if not (due or finished):
                return
        printed[event.stage] = (now, tenths)
        say(f"{event.stage} {_count(event)} {facts_in_words(event)}".rstrip())

    return advance


def _count(event: Event) -> str:
    """The progress of an event as text, such as "3/10"; empty if it counts nothing."""
    if event.total is None:
        return str(event.done) if event.done else ""
    return f"{event.done}/{event.total}"


def facts_in_words(event: Event) -> str:
    """The facts of an event as text, such as "loss 1.23  tokens/s 456"."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in event.facts.items()
    )
