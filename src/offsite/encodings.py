"""Decodes text files that a person wrote, in UTF-8, UTF-16 or UTF-32; a byte-order mark or zero bytes show which one.

Programs of Windows write all of them: Notepad adds a byte-order mark to UTF-8, and `>` of PowerShell writes UTF-16.
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
    """Convert the content of a text file from UTF-16 or UTF-32 to UTF-8, and remove the byte-order mark.

    Content in any other encoding is returned unchanged.

    Raises:
        UnicodeError: the content begins as UTF-16 or UTF-32, but the rest is not valid.
    """
    encoding: str = json.detect_encoding(content[:4]) if content else "utf-8"
    for mark, name in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], name
            break
    return content if encoding.startswith("utf-8") else content.decode(encoding).encode("utf-8")


def decode_text(content: bytes) -> str:
    """Decode the content of a text file in UTF-8, UTF-16 or UTF-32, and remove the byte-order mark.

    Raises:
        UnicodeError: the content is in another encoding, or not valid.
    """
    return as_utf8(content).decode("utf-8")
