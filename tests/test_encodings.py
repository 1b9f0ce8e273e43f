import codecs

import pytest

from offsite.encodings import as_utf8, decode_text

TEXT = "[tune]\nrank = 4  # \u00e4\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-32-be"),
    ],
    ids=["utf-8", "utf-8 with mark", "utf-16", "utf-16-be", "utf-16-le without mark", "utf-32", "utf-32-be"],
)
def test_text_of_every_encoding_with_a_mark(content: bytes) -> None:
    assert decode_text(content) == TEXT
    assert as_utf8(content) == TEXT.encode()


def test_other_encodings_and_nothing() -> None:
    assert as_utf8(b"") == b""
    assert as_utf8(TEXT.encode("latin-1")) == TEXT.encode("latin-1")
    for broken in (TEXT.encode("latin-1"), codecs.BOM_UTF16_LE + b"a"):
        with pytest.raises(UnicodeError):
            decode_text(broken)
