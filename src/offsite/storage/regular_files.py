"""Open files that are not trusted: only regular files, and no more bytes than expected. Torch-free.

All checks use the open file, not its path, so that nobody can replace the file between check and use.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from offsite.errors import VerificationError

# A link is not followed, and opening a pipe does not wait for a writer; systems without these flags have no such traps.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        VerificationError: the path is a link, folder, pipe, socket or device.
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be opened.
    """
    if not stat.S_ISREG(file.lstat().st_mode):  # an open device may act, and a socket cannot be opened
        raise _not_regular(file)
    try:
        descriptor = os.open(file, _FLAGS)
    except OSError:
        if file.is_symlink():  # it became a link after the check above
            raise _not_regular(file) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(file)
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bounded(file: Path, limit: int) -> bytes:
    """Read a regular file up to `limit` + 1 bytes; a result longer than `limit` means that the file is too large.

    Raises:
        VerificationError: the path is a link, folder, pipe, socket or device.
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """
    with open_regular(file) as stream:
        return read_up_to(stream, limit + 1)


def read_up_to(stream: BinaryIO, count: int) -> bytes:
    """The next `count` bytes of a stream, or all remaining bytes if there are fewer."""
    content = bytearray()
    while len(content) < count and (chunk := stream.read(min(count - len(content), 2**20))):
        content += chunk
    return bytes(content)


def _not_regular(file: Path) -> VerificationError:
    """The error for a path that is not a regular file."""
    return VerificationError(f"{file.name!r} is not a plain file")
