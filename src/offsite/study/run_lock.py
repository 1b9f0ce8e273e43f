"""One run of a study at a time: two in one folder would each remove what the other is making."""

from contextlib import AbstractContextManager
from pathlib import Path

from offsite.storage.lock import alone_in


def only_run(folder: Path) -> AbstractContextManager[None]:
    """Hold a study's folder.

    Raises:
        UsageError: another run holds it.
        StorageError: the folder cannot be written.
    """
    return alone_in(
        folder,
        "run of a study",
        "wait for it or stop it, then run the same command again; --report-only works meanwhile",
    )
