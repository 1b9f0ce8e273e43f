"""Write files and folders atomically: each appears complete, or not at all.

The whole project writes through this module, so an interruption or a full disk leaves either the old state or the new
one. Torch-free.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import StorageError, UsageError


@dataclass(frozen=True)
class Written:
    """The record of a written file: its name in its folder, its size in bytes and its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Context manager: yield a temporary folder next to `out`, and rename it to `out` at the end of the body.

    If the body of the `with` statement raises an exception, the temporary folder is removed instead.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        StorageError: a folder or file cannot be written; `out` is unchanged.
    """
    require_free(out)
    out = out.resolve()  # the temporary folder's name is made from the name of `out`, and "." has none
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    try:
        with storage_errors(out):
            yield staging
            _sync_folder(staging)
            if os.name == "nt" and out.exists():  # elsewhere renaming replaces an empty folder in one step
                out.rmdir()
            staging.rename(out)
            with contextlib.suppress(OSError):  # the folder is complete by now
                _sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_free(out: Path) -> None:
    """Raise an error if an output folder is not free; called before any work is done.

    Raises:
        UsageError: `out` exists and is not an empty folder.
    """
    with storage_errors(out):
        taken = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    if taken:
        raise UsageError(
            f"{out} exists and is not an empty folder",
            next_step="name another folder with --out, or move this one away; nothing was overwritten",
        )


def write_stream(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> Written:
    """Write the chunks to a new file, hash them at the same time, and flush the file to the disk."""
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file:
        for chunk in chunks:
            _write(file.fileno(), chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return Written(path.name, size, digest.hexdigest())


def replace_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file atomically: a reader sees the complete old content or the complete new content.

    Raises:
        StorageError: the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                _write(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex; the file is read, not memory-mapped, as a map would count as process memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Context manager: turn an OSError in the body into a StorageError about `path`, with a next step for the user."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            reasons=[f"failed at {error.filename}"] if error.filename else (),
            next_step=_ADVICE.get(error.errno or 0, "check the path and the disk, then run the same command again")
            + "; nothing half-written was left",
        ) from error


_ADVICE = {
    errno.ENOSPC: "free some space on that disk or name another one, then run the same command again",
    errno.EDQUOT: "free some of your quota or name another disk, then run the same command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that is not read-only",
}


def _write(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
