"""Decodes text files that a person wrote: UTF-8, or UTF-16 or UTF-32, which a byte-order mark or zero bytes show.

Editors and shells of Windows write such files: Notepad marks UTF-8, `>` of PowerShell writes UTF-16.
"""

import codecs
import json

_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def as_utf8(content: bytes) -> bytes:
    """The content of a text file as UTF-8, without a byte-order mark. Other encodings than UTF-16 and 32 are unchanged.

    Raises:
        UnicodeError: it begins as UTF-16 or UTF-32, and is not that.
    """
    encoding: str = json.detect_encoding(content[:4]) if content else "utf-8"
    for mark, name in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], name
            break
    return content if encoding.startswith("utf-8") else content.decode(encoding).encode("utf-8")


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, without a byte-order mark.

    Raises:
        UnicodeError: it is in another encoding, or broken.
    """
    return as_utf8(content).decode("utf-8")
