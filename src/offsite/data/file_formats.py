"""Files -> records: JSON lines, JSON lists, CSV, TSV, Parquet and Arrow tables.

A record is one row of a file before its fields are interpreted: its number in the file and its fields. A record that
cannot be read has an error text instead of fields.
"""

import csv
import io
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.data.parquet_and_arrow import read_table
from offsite.data.text_files import kind, read_text, read_utf8, unreadable
from offsite.storage.strict_json import strict_json

RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")  # suffixes of files that hold rows
_TABLES = (".parquet", ".arrow")
_AS_JSON = ("messages", "choices", "answer")  # columns of a CSV file that hold JSON; "answer" only next to "choices"
_REFUSED = {  # suffixes of unsupported files, and what the user can do with such a file
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it and name what was in it"),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "save its sheet as CSV, encoded as UTF-8"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub"), "save its text as .txt"),
    **dict.fromkeys((".feather", ".orc", ".avro", ".h5", ".pkl", ".pickle"), "write it as Parquet or JSON lines"),
}
_LONGEST_CELL = 2**31 - 1  # characters; the default limit of the csv module is 131,072


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file: its number, and its fields or an error text."""

    file: Path
    number: int  # line or row, from 1
    fields: dict[str, Any] | str  # or an error text


def read_records(path: Path, wanted: Container[str] | None = None) -> Iterator[Record]:
    """Read the records of a file, in order. The file's name gives the format; if it gives none, JSON lines are assumed.

    Args:
        path: the file.
        wanted: the names of the columns to read from a table; in a record, other columns have the value None. If
            `wanted` is None, all columns are read.

    Raises:
        DataError: the file as a whole cannot be read.
        UsageError: the format needs pyarrow, which is not installed.
    """
    if (advice := _REFUSED.get(kind(path))) is not None:
        raise unreadable(path, f"unsupported file type {kind(path)}: {advice}")
    if kind(path) in _TABLES:
        numbered: Iterator[tuple[int, dict[str, Any] | str]] = enumerate(read_table(path, wanted), start=1)
    elif kind(path) in (".csv", ".tsv"):
        numbered = _from_csv(path, "\t" if kind(path) == ".tsv" else ",")
    else:
        numbered = _from_json(path)
    for number, fields in numbered:
        yield Record(path, number, fields)


def _from_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The records of JSON lines, of one list, or of one object that contains one list of records.

    Yields the number of each record, and its fields or an error text.
    """
    content = read_utf8(path)
    begins = content.lstrip()[:1]
    if begins == b"[" or (begins == b"{" and kind(path) == ".json"):
        try:
            records = _list_in(strict_json(content))
        except ValueError:
            records = None  # lines, or something broken that is reported line by line
        if records is not None:
            for number, fields in enumerate(records, start=1):
                yield number, _as_fields(fields)
            return
    for number, raw in enumerate(content.splitlines(), start=1):
        if raw.strip():  # blank lines are skipped
            yield number, parse_line(raw)


def _list_in(value: object) -> list[Any] | None:
    """The list of records in a JSON value: the list itself, or the only list of objects in an object.

    An object that is a record itself becomes a list of one record. None if the value is neither a list nor an object.
    """
    if isinstance(value, Mapping):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        others = {"text", "prompt", "messages", "conversations", "conversation", "chosen", "instruction"} & set(value)
        return lists[0] if len(lists) == 1 and not others else [value]
    return value if isinstance(value, list) else None


def parse_line(raw: bytes) -> dict[str, Any] | str:
    """Parse one line of JSON; returns its fields, or a text that says what is wrong with it."""
    try:
        return _as_fields(strict_json(raw))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        return f"not JSON: {error}"


def _as_fields(value: object) -> dict[str, Any] | str:
    """The value if it is a JSON object, otherwise an error text."""
    return value if isinstance(value, dict) else f"a {type(value).__name__}, expected an object"


def _from_csv(path: Path, separator: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The records of a CSV file. The first line names the columns; a record's number is the line on which it begins.

    `separator` is the character between two cells.

    Yields the number of each record, and its fields or an error text.
    """
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, delimiter=separator)
    names: list[str] = []
    begins = 1
    try:
        for cells in reader:
            number, begins = begins, reader.line_num + 1
            if not names:
                names = cells
                if len(set(names)) != len(names):
                    raise unreadable(path, f"it names a column twice: {', '.join(names)[:80]}")
                if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
                    raise unreadable(path, f"its columns are separated by {other!r}, expected commas")
            elif len(cells) not in (0, len(names)):
                yield number, f"{len(cells)} cells, expected {len(names)}"
            elif cells:
                yield number, _parse_cells(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        yield begins, f"not CSV: {error}"


def _parse_cells(cells: dict[str, str]) -> dict[str, Any] | str:
    """The fields of a line of a CSV file, in which cells may contain JSON; an error text if such JSON is malformed."""
    fields: dict[str, Any] = dict(cells)
    for name in _AS_JSON:
        if name in cells and (name != "answer" or "choices" in cells):
            try:
                fields[name] = strict_json(cells[name].encode())
            except ValueError as error:
                if name != "answer":  # an answer may be a letter, which is not JSON
                    return f"field {name!r} is not JSON: {error}"
    return fields
