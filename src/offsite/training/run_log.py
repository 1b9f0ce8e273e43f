"""The log of a long run, and the signals that stop a run after its current step."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from offsite.errors import UsageError
from offsite.storage.files import storage_errors
from offsite.storage.leftovers import delete_command

Write = Callable[[Mapping[str, Any]], None]  # takes a record of the log


def log_file(out: Path) -> Path:
    """The path of the JSONL log of a run: a file next to the run's result `out`, never inside it."""
    out = out.resolve()  # "." has no name
    return out.with_name(f"{out.name}.log.jsonl")


def run_folder(out: Path) -> Path:
    """The path of the folder with the resume points of the run whose result is `out`."""
    out = out.resolve()  # "." has no name
    return out.with_name(f"{out.name}.run")


def require_resume_asked(folder: Path, *, resume: bool, restartable: bool = False) -> bool:
    """Refuse to start a new run in a folder that holds an interrupted run. Changes no file.

    Args:
        folder: the folder, from `run_folder`.
        resume: whether the user wants to continue the interrupted run.
        restartable: whether an interrupted run without a resume point may be replaced by a new one.

    Returns:
        Whether there is an interrupted run to continue.

    Raises:
        UsageError: there is an interrupted run, and `resume` is False.
    """
    interrupted = (folder / "run.json").exists() and (not restartable or (folder / "state.json").exists())
    if interrupted and not resume:
        raise UsageError(
            f"an interrupted run is in {folder}",
            next_step=f"continue it with --resume, or remove it to start again: {delete_command([folder])}",
        )
    return interrupted


@contextlib.contextmanager
def run_log(file: Path) -> Iterator[Write]:
    """Context manager: opens the log `file` to append records.

    Yields:
        A function that appends a record. The record is in the file when the call returns, so a crash does not lose it.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        private = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        stream = os.fdopen(private, "a", encoding="utf-8")

    def write(record: Mapping[str, Any]) -> None:
        with storage_errors(file):
            stream.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            stream.flush()

    with stream:
        yield write


def records(file: Path, event: str) -> Iterator[Mapping[str, Any]]:
    """Yield the records in a log whose event is `event`, in order; none if the log cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):  # a run that was killed may have left half a line
            record = json.loads(line)
            if isinstance(record, dict) and record.get("event") == event:
                yield record


def last_record(file: Path, event: str, step: int | None = None) -> Mapping[str, Any] | None:
    """The last record of an event in a log; None if there is no such record or the log cannot be read.

    Args:
        file: the log.
        event: the name of the event.
        step: only records of this step count; None: those of all steps.
    """
    found = None
    for record in records(file, event):
        found = record if step in (None, record.get("step")) else found
    return found


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM.

    Unlike Ctrl-C in a terminal, SIGTERM reaches only this process, not the processes that it started.
    """


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Context manager: SIGTERM interrupts the body of the `with` statement as Ctrl-C does.

    `kill`, containers and batch systems send SIGTERM. A handler for SIGTERM that is already installed is not replaced.

    Raises:
        Terminated: SIGTERM arrived.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Context manager: the first Ctrl-C or SIGTERM sets a flag, so that the caller can stop after the current step.

    A second signal interrupts at once.

    Yields:
        A function that returns whether the user has asked to stop.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {one: signal.signal(one, ask) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
