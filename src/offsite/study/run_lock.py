"""A lock that lets one study at a time run in a folder: two would remove each other's files."""

from contextlib import AbstractContextManager
from pathlib import Path

from offsite.storage.lock import alone_in


def lock_study(folder: Path) -> AbstractContextManager[None]:
    """Context manager: lock a study's folder during the body of the `with` statement.

    Raises:
        UsageError: another run holds the lock.
        StorageError: the folder cannot be written.
    """
    return alone_in(
        folder,
        "run of a study",
        "wait for it or stop it, then run the same command again; --report-only works meanwhile",
    )
