"""Output for people and scripts: results on standard output; progress, hints and errors on standard error.

Text from an artifact may come from a stranger, so control characters are shown as escapes, never sent to the terminal.
"""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from offsite.errors import OffsiteError, StorageError
from offsite.progress import Event, Progress

INTERRUPTED = 130
START_OVER = "run the same command again to start over"
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_AT_LEAST = 2.0
_LIST_SHOWN = 12


def show(result: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print a result on standard output: JSON, or lines of name and value."""
    if as_json:
        typer.echo(render_json(result))
        return
    rows = list(_rows(result))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(printable(f"{name:<{width}}  {value}"))


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
    """A line on standard error."""
    sys.stderr.write(printable(f"offsite: {text}\n"))  # typer.echo would go past the bars, and into one of them


def hint(text: str) -> None:
    """What to do next: on standard error, and only where a person looks at it."""
    if sys.stderr.isatty():
        say(text)


def show_error(error: OffsiteError, *, as_json: bool) -> None:
    """An error in one screen: what, every reason, the next step."""
    _failed(type(error).__name__, error.exit_code, error.what, error.reasons, error.next_step, as_json=as_json)


def show_usage_error(error: typer.TyperException, *, as_json: bool) -> None:
    """Print the error of a flag or argument that the parser refused."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return
    context = getattr(error, "ctx", None)
    next_step = f"see `{context.command_path} --help`" if context is not None else None
    _failed("UsageError", error.exit_code, error.format_message(), (), next_step, as_json=as_json)


def show_interruption(next_step: str, *, as_json: bool) -> int:
    """That the command was stopped; returns the exit code."""
    what = "stopped; nothing half-written was left"
    say(f"{what}. {next_step[0].upper()}{next_step[1:]}")
    if as_json:
        _show_failure("Interrupted", INTERRUPTED, what, (), next_step)
    return INTERRUPTED


def show_system_error(error: OSError, *, as_json: bool) -> int:
    """What the system refused: as a rule standard output that takes nothing more; returns the exit code."""
    if error.filename is None:
        as_json = False
        with contextlib.suppress(OSError):  # at its end Python would try once more to write what is left
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
    if error.errno != errno.EPIPE:  # whoever read it has gone, as `head` does
        what = f"cannot use {error.filename or 'standard output'}: {error.strerror or error}"
        next_step = "check the disk and the path, then run the same command again"
        show_error(StorageError(what, next_step=next_step), as_json=as_json)
    return StorageError.exit_code


def _failed(
    kind: str, exit_code: int, what: str, reasons: tuple[str, ...], next_step: str | None, *, as_json: bool
) -> None:
    _mark("error: ", fg="red", bold=True)
    typer.echo(printable(what), err=True)
    for reason in reasons:
        typer.echo(printable(f"  - {reason}"), err=True)
    if next_step:
        _mark("next: ", fg="cyan")
        typer.echo(printable(next_step), err=True)
    if as_json:  # last, since standard output may take nothing more
        _show_failure(kind, exit_code, what, reasons, next_step)


def _show_failure(kind: str, exit_code: int, what: str, reasons: tuple[str, ...], next_step: str | None) -> None:
    body = {"kind": kind, "exit_code": exit_code, "what": what, "reasons": list(reasons), "next_step": next_step}
    show({"error": body}, as_json=True)


def _mark(word: str, **style: Any) -> None:
    """The start of a line on standard error, in colour where that is wanted (see no-color.org)."""
    typer.secho(word, err=True, nl=False, color=False if os.environ.get("NO_COLOR") else None, **style)


def printable(text: str) -> str:
    """Escape every control character of a text except line ends."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _rows(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in result.items():
        label = f"{prefix}{name}" if prefix else name.replace("_", " ")  # below the top, names may be a stranger's
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}.")
        elif isinstance(value, list | tuple):
            yield from _list_rows(label, value)
        elif value is not None:
            yield label, _value(name, value)


def _list_rows(label: str, values: "list[Any] | tuple[Any, ...]") -> Iterator[tuple[str, str]]:
    """Numbers and words in one line; sentences below each other, with the label before the first."""
    most = len(values) if all(isinstance(value, int) for value in values) else _LIST_SHOWN
    for value in values[:most]:
        if isinstance(value, Mapping):
            yield from _rows(value, f"{label}.")
    texts = [str(value) for value in values[:most] if not isinstance(value, Mapping)]
    words = not any(" " in text for text in texts)
    texts += [f"and {len(values) - most} more"] if len(values) > most else []
    for at, text in enumerate([", ".join(texts)] if texts and words else texts):
        yield "" if at else label, text


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "bytes" and isinstance(value, int):
        return f"{value:,} ({value / 2**20:.1f} MiB)"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def showing_progress() -> Iterator[Progress]:
    """Show the events of a stage: bars on a terminal, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield lines()
        return
    from offsite.cli.progress_bars import bars  # rich takes a while to import

    with bars() as progress:
        yield progress


def lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress as plain lines: the first and last event of a stage, and each 10 % or 10 seconds between."""
    printed: dict[str, tuple[float, int]] = {}  # by stage: when, and how many tenths were done

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
    if event.total is None:
        return str(event.done) if event.done else ""
    return f"{event.done}/{event.total}"


def facts_in_words(event: Event) -> str:
    """What an event says beside how far it is: loss 1.23  tokens/s 456."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in event.facts.items()
    )
