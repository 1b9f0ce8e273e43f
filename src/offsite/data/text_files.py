"""Files -> text: the encodings and compressions that a data set may have, and the meaning of file name suffixes.

Compression is detected from the first bytes of a file, since a browser may have decompressed the file without a change
of its name. Text is UTF-8, or UTF-16 or UTF-32 (detected by a byte-order mark or by zero bytes).
"""

import bz2
import gzip
import lzma
import shlex
from pathlib import Path

from offsite.encodings import as_utf8
from offsite.errors import DataError
from offsite.extras import require

EXPECTED = "JSONL, .json, .csv, .tsv, .parquet, .arrow, .txt, or a folder of such files"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # these suffixes come after the suffix of the file's format
_GZIP, _BZ2, _XZ, _ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def kind(path: Path) -> str:
    """The suffix that shows the format of a file, in lower case; a suffix of compression, such as ".gz", is ignored."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_compressed(path: Path) -> bool:
    """Whether the name of a file says that it is compressed."""
    return path.suffix.lower() in COMPRESSED


def unreadable(path: Path, why: str) -> DataError:
    """Make the error for a data set that cannot be read as a whole; `why` is the reason."""
    return DataError(f"cannot read the data set {path}: {why}", next_step=f"check the path; it is {EXPECTED}")


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a file, decompressed.

    Raises:
        DataError: the file cannot be read.
        UsageError: the file is compressed by Zstandard, and pyarrow is not installed.
    """
    try:
        content = path.read_bytes()
        require_content(path, content)
        if content.startswith(_GZIP):
            return gzip.decompress(content)
        if content.startswith(_BZ2):
            return bz2.decompress(content)
        if content.startswith(_XZ):
            return lzma.decompress(content)
        if content.startswith(_ZSTANDARD):
            return _from_zstandard(content)
    except OSError as error:  # also raised for a broken gzip file
        raise unreadable(path, error.strerror or str(error)) from None
    except (EOFError, ValueError, lzma.LZMAError) as error:
        raise unreadable(path, f"its compressed content is damaged: {str(error)[:100]}") from None
    return content


def require_content(path: Path, content: bytes) -> None:
    """Refuse content that is a placeholder for a file which was not downloaded; `content` may be the first bytes alone.

    Raises:
        DataError: the content is a pointer of Git LFS, or a web page.
    """
    if content.startswith(_LFS_POINTER):
        raise unreadable(path, "it is a Git LFS pointer, the file was not downloaded: run `git lfs pull` in its folder")
    if content[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise unreadable(path, "it is a web page: download the file itself")


def _from_zstandard(content: bytes) -> bytes:
    """Decompress Zstandard with pyarrow."""
    arrow = require("pyarrow", "data", "reading .zst files")
    parts = []
    with arrow.CompressedInputStream(arrow.BufferReader(content), "zstd") as stream:
        while part := stream.read(1 << 24):
            parts.append(part)
    return b"".join(parts)


def read_utf8(path: Path) -> bytes:
    """Read a text file as UTF-8 bytes, without a byte-order mark. UTF-16 and UTF-32 are converted.

    Raises:
        DataError: the file cannot be read, or is broken UTF-16 or UTF-32.
    """
    content = read_bytes(path)
    try:
        return as_utf8(content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not the {error.encoding.upper()} that it begins as: {str(error)[:100]}",
            next_step="save it as UTF-8",
        ) from None


def read_text(path: Path) -> str:
    """Read the text of a plain text file; only a byte-order mark is removed.

    Raises:
        DataError: the file cannot be read, is empty, or is not UTF-8, UTF-16 or UTF-32.
    """
    try:
        text = read_utf8(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}",
            next_step=f"convert it, from what it is: iconv -f windows-1252 -t utf-8 {shlex.quote(str(path))} > "
            f"{shlex.quote(f'utf8-{path.name}')}",
        ) from None
    if not text.strip():
        raise DataError(f"the data set {path} is empty", next_step="write some text into it")
    return text
