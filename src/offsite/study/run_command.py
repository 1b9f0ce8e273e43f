"""Runs one `offsite` command in its own process, so that its time and peak memory are measured alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import OffsiteError
from offsite.training.run_log import Terminated

Words = list[str | Path]
STOP_SECONDS = 30.0  # time that an interrupted command has for cleaning up


@dataclass(frozen=True)
class Outcome:
    """The JSON that a command printed, its wall time, and its peak resident memory.

    The peak comes from the operating system (ru_maxrss). It is never below the size of this process, since a child
    process starts as a copy of its parent. It is None where the system does not report it.
    """

    result: Any
    seconds: float
    peak_bytes: int | None


def run_command(words: Sequence[str | Path], doing: str, log: Path | None = None) -> Outcome:
    """Run one `offsite` command with --json.

    Args:
        words: the command's words after `offsite`.
        doing: the work that stops if the command fails, such as "the demo"; the error message names it.
        log: file for the command's progress and messages; None sends them to our standard error.

    Raises:
        OffsiteError: the command failed; it has the command's exit code. With a log it also has the command's message,
            else that message was printed already.
    """
    command = [sys.executable, "-m", "offsite", *(str(word) for word in words), "--json"]
    started = time.monotonic()
    with ExitStack() as open_files:
        stderr = open_files.enter_context(log.open("wb")) if log else None
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment) as process:
            try:
                stdout = process.stdout.read() if process.stdout else b""
                peak = _wait(process)
            except KeyboardInterrupt as stopped:
                stop(
                    process,
                    signalled=sys.stdin is not None and sys.stdin.isatty() and not isinstance(stopped, Terminated),
                )
                raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode != 0:
        raise failed(words, process.returncode, doing, stdout if log else b"")
    return Outcome(json.loads(stdout), round(time.monotonic() - started, 2), peak)


def settings_toml(tables: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Make the content of a settings file for --config, a table for each stage; settings that are None are left out."""
    lines: list[str] = []
    for table, settings in tables.items():
        present = {name: value for name, value in settings.items() if value is not None}
        lines += [f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in present.items()), ""]
    return "\n".join(lines).encode()


def _toml(value: object) -> str:
    """A value in the syntax of TOML, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _wait(process: "subprocess.Popen[bytes]") -> int | None:
    """Wait for the process, set its `returncode`, and return its peak memory in bytes."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def stop(process: "subprocess.Popen[bytes]", *, signalled: bool) -> None:
    """End a command after an interruption: wait until it has cleaned up, or kill it after `STOP_SECONDS`.

    If `signalled`, the terminal has already sent it the interrupt; otherwise it is sent a termination signal now.
    """
    if not signalled:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def failed(words: Sequence[str | Path], code: int, doing: str, stdout: bytes) -> OffsiteError:
    """Build the error for a command that ended with an exit code, from the JSON error that it printed, if any.

    Args:
        words: the command's words after `offsite`.
        code: the exit code; negative if a signal ended the command.
        doing: the work that stops, such as "the demo", for the message.
        stdout: what the command printed.
    """
    printed = _error_in(stdout)
    error = (
        OffsiteError(str(printed["what"]), reasons=printed.get("reasons") or (), next_step=printed.get("next_step"))
        if printed
        else OffsiteError(
            f"{doing} stopped: `offsite {' '.join(str(word) for word in words)}` ended with exit code {code}",
            next_step="read its message above; run the same command again to continue from here",
        )
    )
    error.exit_code = code if 0 < code < 128 else 1
    return error


def _error_in(stdout: bytes) -> dict[str, Any]:
    """The error that a command printed as JSON; {} if its output has none."""
    try:
        printed = json.loads(stdout)
    except ValueError:
        return {}
    error = printed.get("error") if isinstance(printed, dict) else None
    return error if isinstance(error, dict) else {}
