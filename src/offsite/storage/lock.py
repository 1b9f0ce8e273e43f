"""A lock for one process at a time in a folder: two would remove each other's files. Torch-free."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from offsite.errors import UsageError
from offsite.storage.files import storage_errors

LOCK = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path, work: str, next_step: str) -> Iterator[None]:
    """Lock a folder during the `with` block; the system releases the lock when this process ends, even by a crash.

    Args:
        folder: the folder to lock; it is created if it does not exist.
        work: the name of the work that another process would be doing there, for the error.
        next_step: what the user can do if the folder is locked, for the error.

    Raises:
        UsageError: another process holds the lock.
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
