"""Encodings and compression of data sets."""

import bz2
import codecs
import gzip
import json
import lzma

import pytest

from offsite import extras
from offsite.data.read_rows import read_rows
from offsite.data.text_files import kind
from offsite.errors import DataError, UsageError

RECORDS = [{"prompt": "é?", "completion": "ü\u2028🦊"}, {"text": "a"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
ENCODINGS = {
    "UTF-8": LINES.encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + LINES.encode(),
    "UTF-16 with a mark": codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
    "UTF-16 big-endian with a mark": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "UTF-16": LINES.encode("utf-16-le"),
    "UTF-16 big-endian": LINES.encode("utf-16-be"),
    "UTF-32 with a mark": codecs.BOM_UTF32_LE + LINES.encode("utf-32-le"),
    "UTF-32 big-endian with a mark": codecs.BOM_UTF32_BE + LINES.encode("utf-32-be"),
    "UTF-32": LINES.encode("utf-32-le"),
    "lines that end as in Windows": LINES.replace("\n", "\r\n").encode(),
    "lines that end as in Windows, UTF-16": codecs.BOM_UTF16_LE + LINES.replace("\n", "\r\n").encode("utf-16-le"),
}


def zstandard(content):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_in_every_encoding(tmp_path, encoding):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ENCODINGS[encoding])
    rows = read_rows(file)
    assert [(row.line, row.prompt, row.completion) for row in rows] == [(1, "é?", "ü\u2028🦊"), (2, None, "a")]


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("a.csv", "text\né\n", "é"), ("a.txt", "é\n", "é\n"), ("a.tsv", "text\tid\né\t1\n", "é")],
)
def test_tables_and_texts_with_a_mark_of_utf16(tmp_path, mark, name, content, said):
    (tmp_path / name).write_bytes(mark + content.encode("utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"))
    (row,) = read_rows(tmp_path / name)
    assert row.completion == said


def test_utf16_that_breaks_off(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(codecs.BOM_UTF16_LE + LINES.encode("utf-16-le")[:-1])
    with pytest.raises(DataError, match="is not the UTF-16-LE that it begins as"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
def test_what_is_no_unicode_comes_with_a_command_that_converts_it(tmp_path, name):
    (tmp_path / name).write_bytes("text\né\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 at byte 5") as caught:
        read_rows(tmp_path / name)
    assert "iconv -f windows-1252 -t utf-8" in caught.value.next_step


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.json", "rows"])
def test_compressed_files_say_the_same(tmp_path, suffix, name):
    plain = tmp_path / name
    content = {"rows.csv": b"prompt,completion\na,b\n", "rows.json": json.dumps(RECORDS).encode()}.get(
        name, LINES.encode()
    )
    plain.write_bytes(content)
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(COMPRESSED[suffix](content))
    assert read_rows(packed) == read_rows(plain)
    packed.write_bytes(content)  # a browser took the compression off, and left the name
    assert read_rows(packed) == read_rows(plain)
    packed.rename(plain)
    plain.write_bytes(COMPRESSED[suffix](content))
    assert read_rows(plain)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_several_compressed_parts_are_one_file(tmp_path, suffix):
    lines = LINES.splitlines(keepends=True)
    assert len(lines) == 3  # U+2028 is no end of a line to us
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(
        COMPRESSED[suffix]((lines[0] + lines[1]).encode()) + COMPRESSED[suffix](lines[2].encode())
    )
    assert len(read_rows(tmp_path / f"rows.jsonl{suffix}")) == 2


def test_a_compressed_parquet_file(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    assert read_rows(tmp_path / "rows.parquet.gz") == read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_damaged_compressed_file(tmp_path, suffix):
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(COMPRESSED[suffix](LINES.encode() * 50)[:-20])
    with pytest.raises(DataError, match="cannot read the data set"):
        read_rows(tmp_path / f"rows.jsonl{suffix}")


def test_zstandard_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard(LINES.encode()))

    def missing(module):
        if module.startswith("offsite."):
            return __import__(module, fromlist=["_"])
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"reading \.zst files needs") as caught:
        read_rows(tmp_path / "rows.jsonl.zst")
    assert "[data]" in caught.value.next_step


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.JSONL.GZ", ".jsonl"),
        ("a.b.csv.zst", ".csv"),
        ("a.gz", ""),
        ("a", ""),
        ("a.tar.gz", ".tar"),
    ],
)
def test_the_end_of_a_name(tmp_path, name, expected):
    assert kind(tmp_path / name) == expected


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.txt", "rows.csv", "rows.arrow"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "it is a web page"),
    ],
)
def test_what_stands_in_the_place_of_a_file(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name)
