"""A lock that lets one process at a time work in a folder: two would remove each other's files. Torch-free."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from offsite.errors import UsageError
from offsite.storage.files import storage_errors

LOCK = ".lock"
_SECONDS = 30.0  # how long a process waits for one that changes a folder for a moment


@contextlib.contextmanager
def alone_in(folder: Path, work: str, next_step: str) -> Iterator[None]:
    """Context manager: lock a folder during the body of the `with` statement.

    The operating system releases the lock when this process ends, even by a crash.

    Args:
        folder: the folder to lock; it is created if it does not exist.
        work: a noun for the work that a process does there, such as "study"; the error names it.
        next_step: the advice to the user in the error that is raised if another process has the lock.

    Raises:
        UsageError: another process has the lock.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    with storage_errors(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another {work} is at work in {folder}", reasons=[f"it holds {folder / LOCK}"], next_step=next_step
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def waiting_in(folder: Path) -> Iterator[None]:
    """Context manager: lock a folder for a short change during the body; other processes wait for their turn.

    Raises:
        UsageError: another process has held the lock for half a minute.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    with storage_errors(folder / LOCK):
        try:
            lock.acquire(timeout=_SECONDS)
        except Timeout:
            raise UsageError(
                f"another process has been changing {folder} for {_SECONDS:.0f} s",
                reasons=[f"it holds {folder / LOCK}"],
                next_step="end that process, then run the same command again",
            ) from None
    try:
        yield
    finally:
        lock.release()
