"""Write files and folders atomically: each appears complete, or not at all.

The whole project writes through this module, so an interruption or a full disk leaves either the old state or the new
one. Torch-free.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import StorageError, UsageError
from offsite.storage.background_hash import BackgroundHash
from offsite.storage.leftovers import delete_command, leftovers_in
from offsite.storage.staging_claims import claimed, sweep, temporary_name

LONGEST_NAME = 240  # bytes of an output folder's name: disks take 255, and the log next to it has a longer one


@dataclass(frozen=True)
class Written:
    """The record of a written file: its name in its folder, its size in bytes and its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder; it becomes `out` if the `with` block ends without an exception.

    If `out` is an empty folder, the files are moved into it and it keeps its permissions: it may be the current
    directory or a mount point. Weights are moved before config and signature, so that after a power cut in between
    nothing loads or verifies.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        StorageError: a folder or file cannot be written; `out` is unchanged.
    """
    require_free(out)
    out = out.resolve()  # "." has no name to derive the sibling's from
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        inside = _must_stage_inside(out)
        sweep(out, inside=inside)
        staging = (out if inside else out.parent) / _temporary_name(out)
        staging.mkdir()
    try:
        with storage_errors(out), claimed(staging) as there:
            if not there:  # another process began in the same moment, and took it for one that was left
                staging.mkdir(exist_ok=True)
            yield staging
            _sync_folder(staging)
            if out.exists():
                _fill(out, staging)
            else:
                staging.rename(out)
            with contextlib.suppress(OSError):  # the folder stands by now
                _sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _must_stage_inside(out: Path) -> bool:
    """Whether the temporary folder must be made in the folder `out` itself instead of next to it.

    This is so if `out` exists and is on another disk than its parent folder, or the parent folder is not writable.
    """
    if not out.exists():
        return False
    return out.stat().st_dev != out.parent.stat().st_dev or not os.access(out.parent, os.W_OK)


def _fill(out: Path, staging: Path) -> None:
    """Move the entries of the folder `staging` into the empty folder `out`; if one fails, move all of them back."""
    entries = sorted(staging.iterdir(), key=lambda path: (path.suffix in (".json", ".sig"), path.name))
    if others := [path for path in out.iterdir() if path != staging]:
        raise FileExistsError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(others[0]))
    moved: list[Path] = []
    try:
        moved.extend(entry.rename(out / entry.name) for entry in entries)
    except OSError:
        for path in reversed(moved):
            path.rename(staging / path.name)
        raise
    _sync_folder(out)


def require_free(out: Path, flag: str = "--out") -> None:
    """Check, before any work is done, that an output folder does not exist or is empty.

    Args:
        out: the folder.
        flag: the command-line flag that sets this folder; the advice in the error names it.

    Raises:
        UsageError: `out` exists and is not an empty folder, is inside a file, or has a name that is too long.
    """
    with storage_errors(out):
        problem = _taken(out, flag)
    if problem:
        raise UsageError(f"{out} exists and is not an empty folder", reasons=problem[:1], next_step=problem[1])
    nearest = next((path for path in out.absolute().parents if path.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise UsageError(
            f"{out} cannot be made: {nearest} is a file",
            next_step=f"name a folder that is not inside a file with {flag}",
        )
    if len(os.fsencode(out.resolve().name)) > LONGEST_NAME:
        raise UsageError(
            f"the name of {out} is too long",
            reasons=[f"{len(os.fsencode(out.resolve().name))} bytes, at most {LONGEST_NAME}"],
            next_step=f"name a folder with a shorter name with {flag}",
        )


def _taken(out: Path, flag: str) -> tuple[str, str] | None:
    """Why an output folder cannot be used, and the advice for the error; None if it does not exist or is empty.

    `flag` is the command-line flag that sets this folder; the advice names it.
    """
    if out.is_symlink():
        target = out.resolve()
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        where = f"{flag} {shlex.quote(str(target))}" if free else f"another folder with {flag}"
        return f"it is a link to {target}", f"name {where}, or move the link away; nothing was overwritten"
    if not out.exists():
        return None
    if not out.is_dir():
        return "it is a file", f"name another folder with {flag}, or move this file away; nothing was overwritten"
    held = sorted(path.name for path in out.iterdir())
    if not held:
        return None
    holds = f"it holds {', '.join(held[:3])}{f' and {len(held) - 3} more' if len(held) > 3 else ''}"
    if len(held) == len(left := leftovers_in(out)):
        return holds, f"delete what a program left there: {delete_command(left)}"
    return holds, f"name another folder with {flag}, or move this one away; nothing was overwritten"


def write_stream(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> Written:
    """Write the chunks to a new file, flush it to the disk, and return its name, size and SHA-256.

    A chunk is hashed while it is written and the next one is made, so `chunks` must not change one that it has yielded.
    """
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file, BackgroundHash(digest.update) as hashing:
        for chunk in chunks:
            hashing.add(chunk)
            _write(file.fileno(), chunk)
            size += len(chunk)
        os.fsync(file.fileno())
    return Written(path.name, size, digest.hexdigest())


def replace_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file atomically: a reader sees the complete old content or the complete new content.

    Args:
        path: the file, which may exist.
        content: its new content.
        mode: the permission bits of the new file.

    Raises:
        StorageError: the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(_temporary_name(path))
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


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can read; one that exists is closed to others.

    Raises:
        StorageError: it cannot be made, or belongs to another user.
    """
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)


def discard_folder(folder: Path) -> None:
    """Remove a folder so that it is gone at once, even if this process is killed while its files are deleted.

    It gets the name of a temporary folder first, which a later run removes. Errors are ignored.
    """
    doomed = folder.with_name(_temporary_name(folder))
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    sweep(folder)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex. The file is read, not memory-mapped, since mapped pages count as process memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Context manager: turn an OSError in the body into a StorageError about `path`, with advice for the user."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            reasons=[f"failed at {error.filename}"] if error.filename else (),
            next_step=f"{_ADVICE.get(error.errno or 0, _CHECK)}; nothing half-written was left",
        ) from error


_CHECK = "check the path and the disk, then run the same command again"
_ADVICE = {
    errno.ENOSPC: "free some space on that disk or name another one, then run the same command again",
    errno.EDQUOT: "free some of your quota or name another disk, then run the same command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _temporary_name(path: Path) -> str:
    """A random name for a hidden file or folder next to `path`."""
    return temporary_name(path, secrets.token_hex(4))


def _write(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write all of the content, in as many system calls as necessary."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk; does nothing on Windows."""
    if os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
