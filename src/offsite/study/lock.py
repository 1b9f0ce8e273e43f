"""One run of a study at a time: two in one folder would each remove what the other is making."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from offsite.core.storage import storage_errors
from offsite.errors import UsageError

_LOCK = ".lock"


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a study's folder; the system lets go of it when this process ends, however it ends.

    Raises:
        UsageError: another run holds it.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    with storage_errors(folder / _LOCK):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another run of a study is at work in {folder}",
                reasons=[f"it holds {folder / _LOCK}"],
                next_step="wait for it or stop it, then run the same command again; --report-only works meanwhile",
            ) from None
    try:
        yield
    finally:
        lock.release()
