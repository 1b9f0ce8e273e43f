"""Our own commands as processes of their own, so that seconds and peak memory are those of one command alone."""

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
STOP_SECONDS = 30.0  # how long an interrupted command may take to clean up


@dataclass(frozen=True)
class Outcome:
    """What a command printed as JSON, the wall time it took, and the largest resident memory that it had.

    The peak is the operating system's (ru_maxrss); it counts from this process's own size upwards, since a child starts
    as a copy of its parent. None where the system does not say.
    """

    result: Any
    seconds: float
    peak_bytes: int | None


def run_command(words: Sequence[str | Path], doing: str, log: Path | None = None) -> Outcome:
    """Run one command of ours, with --json.

    Args:
        words: after `offsite`.
        doing: what stops when it fails, for the error ("the demo").
        log: a file that takes its progress and messages; None lets them through to our standard error.

    Raises:
        OffsiteError: it failed, with its exit code: in its own words where there is a log, else after having said them.
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
                stop(process, told=sys.stdin is not None and sys.stdin.isatty() and not isinstance(stopped, Terminated))
                raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode != 0:
        raise failed(words, process.returncode, doing, stdout if log else b"")
    return Outcome(json.loads(stdout), round(time.monotonic() - started, 2), peak)


def settings_toml(tables: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A settings file for --config: a table for each stage; what is None is left out, as TOML has no word for it."""
    lines: list[str] = []
    for table, settings in tables.items():
        given = {name: value for name, value in settings.items() if value is not None}
        lines += [f"[{table}]", *(f"{name} = {_toml(value)}" for name, value in given.items()), ""]
    return "\n".join(lines).encode()


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _wait(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code goes where Popen keeps it; returns the peak in bytes."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def stop(process: "subprocess.Popen[bytes]", *, told: bool) -> None:
    """Let an interrupted command clean up; a terminal has sent it the signal as well, else it is told now."""
    if not told:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def failed(words: Sequence[str | Path], code: int, doing: str, stdout: bytes) -> OffsiteError:
    """The error of a command that ended with this code: in its own words, if it printed them as JSON."""
    said = _error_in(stdout)
    error = (
        OffsiteError(str(said["what"]), reasons=said.get("reasons") or (), next_step=said.get("next_step"))
        if said
        else OffsiteError(
            f"{doing} stopped: `offsite {' '.join(str(word) for word in words)}` ended with exit code {code}",
            next_step="its own message stands above; run the same command again to continue from here",
        )
    )
    error.exit_code = code if 0 < code < 128 else 1
    return error


def _error_in(stdout: bytes) -> dict[str, Any]:
    try:
        said = json.loads(stdout)
    except ValueError:
        return {}
    found = said.get("error") if isinstance(said, dict) else None
    return found if isinstance(found, dict) else {}
