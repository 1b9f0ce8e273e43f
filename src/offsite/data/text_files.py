"""Files -> text: what encodings and compression a data set may have, and what the end of a name says.

Compression is known by a file's first bytes, since a browser may have taken it off and left the name. Text is UTF-8, or
UTF-16 or UTF-32 (with a mark, or known by its zeros).
"""

import bz2
import codecs
import gzip
import json
import lzma
from pathlib import Path

from offsite.errors import DataError
from offsite.extras import require

EXPECTED = "JSONL, .json, .csv, .tsv, .parquet, .arrow, .txt, or a folder of such files"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # stand behind the end that says what a file is
_GZIP, _BZ2, _XZ, _ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def kind(path: Path) -> str:
    """The end of a file's name that says what it is, in lower case and without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_compressed(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.suffix.lower() in _COMPRESSED


def unreadable(path: Path, why: str) -> DataError:
    """The error of a data set that cannot be read as a whole."""
    return DataError(f"cannot read the data set {path}: {why}", next_step=f"check the path; it is {EXPECTED}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed.

    Raises:
        DataError: it cannot be read.
        UsageError: it is Zstandard, and neither Python nor pyarrow is there to read it.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            return gzip.decompress(content)
        if content.startswith(_BZ2):
            return bz2.decompress(content)
        if content.startswith(_XZ):
            return lzma.decompress(content)
        if content.startswith(_ZSTANDARD):
            return _from_zstandard(content)
    except OSError as error:  # a broken gzip file too
        raise unreadable(path, error.strerror or str(error)) from None
    except (EOFError, ValueError, lzma.LZMAError) as error:
        raise unreadable(path, f"its compressed content is damaged: {str(error)[:100]}") from None
    return content


def _from_zstandard(content: bytes) -> bytes:
    arrow = require("pyarrow", "data", "reading .zst files")
    parts = []
    with arrow.CompressedInputStream(arrow.BufferReader(content), "zstd") as stream:
        while part := stream.read(1 << 24):
            parts.append(part)
    return b"".join(parts)


def read_utf8(path: Path) -> bytes:
    """The bytes of a text file as UTF-8, without a mark; what is not UTF-16 or UTF-32 is left as it is.

    Raises:
        DataError: it cannot be read, or is broken UTF-16 or UTF-32.
    """
    content = read_bytes(path)
    encoding: str = json.detect_encoding(content[:4]) if content else "utf-8"
    for mark, name in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], name
            break
    if encoding.startswith("utf-8"):
        return content
    try:
        return content.decode(encoding).encode("utf-8")
    except UnicodeError as error:
        raise DataError(
            f"{path} is not the {encoding.upper()} that it begins as: {str(error)[:100]}",
            next_step="save it as UTF-8",
        ) from None


def read_text(path: Path) -> str:
    """A plain text file; not a character is changed but for a byte-order mark.

    Raises:
        DataError: unreadable, neither UTF-8 nor UTF-16 nor UTF-32, or empty.
    """
    try:
        text = read_utf8(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}",
            next_step=f"convert it, from what it is: iconv -f windows-1252 -t utf-8 {path} > utf8-{path.name}",
        ) from None
    if not text.strip():
        raise DataError(f"the data set {path} is empty", next_step="write some text into it")
    return text
