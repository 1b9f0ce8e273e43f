"""What every long run has beside its work: a log of JSON lines, and an end that leaves nothing half done."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from offsite.errors import UsageError
from offsite.storage.files import storage_errors

Write = Callable[[Mapping[str, Any]], None]  # takes a record of the log


def log_file(out: Path) -> Path:
    """The JSONL log of the run that writes `out`; it is beside the result, never in it."""
    out = out.resolve()  # "." has no name
    return out.with_name(f"{out.name}.log.jsonl")


def run_folder(out: Path) -> Path:
    """Where the resume points of the run that writes `out` lie."""
    out = out.resolve()  # "." has no name
    return out.with_name(f"{out.name}.run")


def require_resume_asked(folder: Path, *, resume: bool, points_alone: bool = False) -> bool:
    """Refuse to begin where an interrupted run is; nothing is changed.

    Args:
        folder: from `run_folder`.
        resume: whether the run that is there is to be continued.
        points_alone: whether a run that has saved no resume point is nothing to continue.

    Returns:
        Whether there is a run to continue.

    Raises:
        UsageError: there is one, and it was not to be resumed.
    """
    interrupted = (folder / "run.json").exists() and (not points_alone or (folder / "state.json").exists())
    if interrupted and not resume:
        raise UsageError(
            f"an interrupted run is in {folder}",
            next_step=f"continue it with --resume, or remove it to start anew: rm -r {folder}",
        )
    return interrupted


@contextlib.contextmanager
def run_log(file: Path) -> Iterator[Write]:
    """Append JSON lines to the log; each is on the disk's side of the process when the call returns."""
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a", encoding="utf-8")

    def write(record: Mapping[str, Any]) -> None:
        with storage_errors(file):
            stream.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            stream.flush()

    with stream:
        yield write


def last_record(file: Path, event: str) -> Mapping[str, Any] | None:
    """The last record of a kind in a log; None where there is none, or no log that can be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a run that was killed may have left half a line
            record = json.loads(line)
            if isinstance(record, dict) and record.get("event") == event:
                return record
    return None


class Terminated(KeyboardInterrupt):
    """SIGTERM. Unlike Ctrl-C on a terminal it came to this process alone, and to none that it started."""


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `kill`, containers and batch systems send, end what runs as Ctrl-C does.

    Where somebody handles it already, it stays with them.

    Raises:
        Terminated: it came.
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
    """Hold back the first Ctrl-C or SIGTERM until the step in work is whole; a second one stops at once."""
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
