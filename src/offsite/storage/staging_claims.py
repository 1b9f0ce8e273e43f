"""Temporary folders of killed processes: recognised by their names and by a lock that nobody holds, and removed.

A process holds a lock on its temporary folder while it works there; the operating system releases it when the process
ends in any way. On systems without such locks (Windows) nothing is removed. Torch-free.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_END = r"\.[0-9a-f]{8}\.tmp"  # of the name of a temporary file or folder, see `temporary_name`


def temporary_name(path: Path, number: str) -> str:
    """The name of a hidden file or folder: it begins with the name of `path`, and is short enough for every disk.

    `number` is random: 8 hexadecimal digits.
    """
    return f".{_start_of(path)}.{number}.tmp"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Context manager: hold the lock of a temporary folder, so that no other process removes it.

    Yields whether the folder is still there: another process may have taken it for a left one before it was locked.
    """
    if sys.platform == "win32":
        yield True
        return
    with _opened(folder) as descriptor:
        if descriptor is None:
            yield folder.is_dir()
            return
        with contextlib.suppress(OSError):  # a disk without locks: `sweep` removes nothing there either
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat())


def is_abandoned(folder: Path) -> bool:
    """Whether a temporary folder is there, and the process that made it has ended."""
    if sys.platform == "win32":
        return False
    with _opened(folder) as descriptor:
        if descriptor is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a disk without locks
            return False
        return True


def sweep(path: Path, *, inside: bool = False) -> None:
    """Remove the temporary folders of `path` that killed processes left next to it, or with `inside` in it."""
    pattern = re.compile(re.escape(f".{_start_of(path)}") + _END)
    try:
        found = [one for one in (path if inside else path.parent).iterdir() if pattern.fullmatch(one.name)]
    except OSError:
        return
    for one in found:
        if one.is_dir() and not one.is_symlink():
            _remove_unclaimed(one)


def _remove_unclaimed(folder: Path) -> None:
    """Remove a temporary folder unless a process holds its lock."""
    if sys.platform == "win32":
        return
    with _opened(folder) as descriptor:
        if descriptor is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a disk without locks
            return
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """Context manager: open a folder, for its lock; None if it cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _start_of(path: Path) -> str:
    """The first 200 bytes of a path's name."""
    return os.fsencode(path.name)[:200].decode("utf-8", "ignore")
