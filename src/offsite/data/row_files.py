"""Files -> records: JSONL, CSV, Parquet, plain text, and folders that Hugging Face datasets saved to disk.

A record is its number with its fields, or with what is wrong where it has none; `offsite.data.rows` makes rows of them.
Parquet and saved folders are read with pyarrow (the extra `data`), never with code that came with the data.
"""

import codecs
import csv
import hashlib
import io
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.extras import require
from offsite.storage.files import sha256_of
from offsite.storage.safetensors_files import strict_json

Record = tuple[int, dict[str, Any] | str]  # line or row, from 1; fields, or what is wrong

KINDS = "JSONL, .csv, .parquet, .txt or a saved dataset folder"
RECORDS = (".jsonl", ".csv", ".parquet")  # names of files that hold rows, where other files may be plain text
_AS_JSON = ("messages", "choices", "answer")  # cells of a CSV file that are no strings; an answer that is to choices
_FOREIGN = (
    ".tsv",
    ".xls",
    ".xlsx",
    ".ods",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
    ".pdf",
    ".docx",
    ".arrow",
    ".feather",
)
_LONGEST_CELL = 2**31 - 1  # letters; the csv module by itself stops at 131,072
_STATE = "state.json"  # what datasets.save_to_disk writes


def read_records(path: Path, wanted: Container[str] | None = None) -> Iterator[Record]:
    """The records of a data set, in order; the format is known by the name, JSONL where it says nothing.

    Args:
        path: the file or folder.
        wanted: names of columns; of a table no others are read, and stand in a record without a value. None is all.

    Raises:
        DataError: the file or folder is unreadable as a whole.
        UsageError: the format needs pyarrow, which is not installed.
    """
    if path.is_dir():
        return _from_tables(path, _saved_tables(path, wanted))
    if kind(path) == ".csv":
        return _from_csv(path)
    if kind(path) == ".parquet":
        return _from_tables(path, _parquet_tables(path, wanted))
    if kind(path) in _FOREIGN:
        raise _unreadable(path, f"it is called a {kind(path)} file, which is none that is read")
    return _from_lines(path)


def kind(path: Path) -> str:
    """The end of a file's name that says what it is, in lower case."""
    return path.suffix.lower()


def read_text(path: Path) -> str:
    """A plain text file; not a character is changed but for a byte-order mark.

    Raises:
        DataError: unreadable, not UTF-8, or empty.
    """
    try:
        text = _bytes_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}",
            next_step="convert it, from what it is: iconv -f latin1 -t utf-8",
        ) from None
    if not text.strip():
        raise DataError(f"the data set {path} is empty", next_step="write some text into it")
    return text


def data_digest(path: Path) -> str:
    """SHA-256 of a data set: of the file, or over names and digests of a folder's files.

    Raises:
        DataError: it is a pipe or a device, which says something else when it is read again.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        raise DataError(
            f"{path} is neither a file nor a folder, so it cannot be read again", next_step="write the rows into a file"
        )
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(f"cannot read the data set {path}: {why}", next_step=f"check the path; it is {KINDS}")


def _from_lines(path: Path) -> Iterator[Record]:
    content = _bytes_of(path)
    if content.lstrip().startswith(b"["):
        raise DataError(
            f"{path} is one JSON list, expected an object on each line",
            next_step=f"write its entries line by line: jq -c '.[]' {path} > {path.with_suffix('.jsonl')}",
        )
    for number, raw in enumerate(content.splitlines(), start=1):
        if raw.strip():  # blank lines are passed over
            yield number, _parse_line(raw)


def _parse_line(raw: bytes) -> dict[str, Any] | str:
    try:
        fields = strict_json(raw)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        return f"not JSON: {error}"
    return fields if isinstance(fields, dict) else f"a {type(fields).__name__}, expected an object"


def _from_csv(path: Path) -> Iterator[Record]:
    """The first line names the columns; a record's number is the line on which it begins."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names: list[str] = []
    begins = 1
    try:
        for cells in reader:
            number, begins = begins, reader.line_num + 1
            if not names:
                names = cells
                _require_different(path, names)
                if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
                    raise _unreadable(path, f"its columns are separated by {other!r}, expected commas")
            elif len(cells) not in (0, len(names)):
                yield number, f"{len(cells)} cells, expected {len(names)}"
            elif cells:
                yield number, _parse_cells(dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        yield begins, f"not CSV: {error}"


def _parse_cells(cells: dict[str, str]) -> dict[str, Any] | str:
    fields: dict[str, Any] = dict(cells)
    for name in _AS_JSON:
        if name in cells and (name != "answer" or "choices" in cells):
            try:
                fields[name] = strict_json(cells[name].encode())
            except ValueError as error:
                return f"field {name!r} is not JSON: {error}"
    return fields


def _require_different(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise _unreadable(path, f"it names a column twice: {', '.join(names)[:80]}")


def _from_tables(path: Path, tables: Iterable[tuple[Sequence[str], Any]]) -> Iterator[Record]:
    """Records of tables, each with the names of all its columns."""
    number = 0
    try:
        for names, table in tables:
            for fields in table.to_pylist():
                number += 1
                yield number, dict.fromkeys(names) | fields
    except (OSError, ValueError, OverflowError, LookupError) as error:  # ArrowInvalid is a ValueError
        raise _unreadable(path, f"{str(error).strip()[:200]} (after row {number})") from None


def _parquet_tables(path: Path, wanted: Container[str] | None) -> Iterator[tuple[Sequence[str], Any]]:
    parquet = require("pyarrow.parquet", "data", "reading Parquet")
    with path.open("rb") as file:  # an OSError is told by who iterates
        opened = parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        for table in opened.iter_batches(batch_size=1024, columns=_chosen(path, names, wanted)):
            yield names, table


def _saved_tables(folder: Path, wanted: Container[str] | None) -> Iterator[tuple[Sequence[str], Any]]:
    """What datasets.save_to_disk writes: Arrow streams, and a list of them in state.json."""
    arrow = require("pyarrow", "data", "reading a saved dataset folder")
    for name in _saved_files(folder):
        with (folder / name).open("rb") as file, arrow.ipc.open_stream(file) as stream:
            names = stream.schema.names
            for table in stream:
                yield names, table.select(_chosen(folder, names, wanted))


def _chosen(path: Path, names: Sequence[str], wanted: Container[str] | None) -> list[str]:
    _require_different(path, names)
    return [name for name in names if wanted is None or name in wanted]


def _saved_files(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(part.name for part in folder.iterdir() if (part / _STATE).exists())
        raise _unreadable(folder, f"it holds several splits; name one of the folders {', '.join(splits)} in it")
    if not (folder / _STATE).exists():
        raise _unreadable(folder, f"a folder without {_STATE}, so not one that datasets' save_to_disk wrote")
    state = _parse_line(_bytes_of(folder / _STATE))
    listed = state.get("_data_files") if isinstance(state, dict) else None
    files = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
        raise _unreadable(folder, f"{_STATE} does not list the files of the folder")
    if isinstance(state, dict) and state.get("_indices_files"):
        raise _unreadable(folder, "its rows are picked by an index file; call flatten_indices() and save it again")
    return [str(name) for name in files]
