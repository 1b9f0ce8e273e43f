"""Tables -> records: Parquet files, Arrow files and streams, with the class names that Hugging Face datasets stores.

They are read with pyarrow (the extra `data`), never with code that came with the data.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.data.conversations.parse_messages import without_nulls
from offsite.data.text_files import is_compressed, read_bytes, require_content, unreadable
from offsite.extras import require

_TOGETHER = 1024  # number of rows that are read at once
_FEATURES = b"huggingface"  # key of the column types in a schema's metadata
_FILE_MARK = b"ARROW1"  # first bytes of an Arrow file; an Arrow stream does not have them


class ClassNumber(int):
    """The number of a class in a table, with the name of the class as `name`."""

    name: str

    def __new__(cls, number: int, name: str) -> "ClassNumber":
        """Make a number that has a name."""
        made = super().__new__(cls, number)
        made.name = name
        return made


def read_table(path: Path, wanted: Container[str] | None) -> Iterator[dict[str, Any]]:
    """Read the rows of a table; yields the fields of each row. Columns that are not read have the value None.

    Args:
        path: a Parquet or Arrow file.
        wanted: the names of the columns to read; None reads all.

    Raises:
        DataError: the file cannot be read, or two columns have the same name.
        UsageError: pyarrow is not installed.
    """
    done = 0
    try:
        for names, features, table in _batches(path, wanted):
            labels = {name: found for name in names if (found := class_names(features.get(name)))}
            for fields in table.to_pylist():
                done += 1
                named = {
                    name: ClassNumber(fields[name], found[fields[name]])
                    for name, found in labels.items()
                    if isinstance(fields.get(name), int) and 0 <= fields[name] < len(found)
                }
                yield dict.fromkeys(names) | {name: without_nulls(value) for name, value in fields.items()} | named
    except (OSError, ValueError, OverflowError, LookupError) as error:  # ArrowInvalid is a ValueError
        raise unreadable(path, f"{str(error).strip()[:200]} (after row {done})") from None


def features_of(path: Path) -> Mapping[str, Any]:
    """The column types that Hugging Face datasets stored in a table, by column name; empty if there are none."""
    for _, features, _ in _batches(path, ()):
        return features
    return {}


def class_names(feature: object) -> list[str]:
    """The names of a column's classes, in the order of their numbers; empty if the column does not contain classes.

    Args:
        feature: the type of the column, from `features_of`.
    """
    if not isinstance(feature, Mapping) or feature.get("_type") != "ClassLabel":
        return []
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) else []


def _batches(path: Path, wanted: Container[str] | None) -> Iterator[tuple[Sequence[str], Mapping[str, Any], Any]]:
    """Yields the table in batches, each as all column names, the types of the columns, and rows (an Arrow batch).

    Arguments as for `read_table`.
    """
    arrow = require("pyarrow", "data", "reading Parquet and Arrow tables")
    source = arrow.BufferReader(read_bytes(path)) if is_compressed(path) else path.open("rb")
    with source as file:
        require_content(path, file.read(200))
        file.seek(0)
        if path.name.lower().removesuffix(path.suffix.lower() if is_compressed(path) else "").endswith(".parquet"):
            opened = require("pyarrow.parquet", "data", "reading Parquet").ParquetFile(file)
            schema = opened.schema_arrow
            columns = _chosen(path, schema.names, wanted)
            for table in opened.iter_batches(batch_size=_TOGETHER, columns=columns):
                yield schema.names, _features(schema, path), table
            return
        begins = file.read(len(_FILE_MARK))
        file.seek(0)
        if begins == _FILE_MARK:
            opened = arrow.ipc.open_file(file)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            opened = arrow.ipc.open_stream(file)
            batches = iter(opened)
        columns = _chosen(path, opened.schema.names, wanted)
        for table in batches:
            yield opened.schema.names, _features(opened.schema, path), table.select(columns)


def _features(schema: Any, path: Path) -> Mapping[str, Any]:
    """The types of the columns, by name; empty if they are not stored.

    They are in the schema's metadata, or in dataset_info.json in the same folder.
    """
    stored = (schema.metadata or {}).get(_FEATURES)
    try:
        if stored is not None:
            features = json.loads(stored)["info"]["features"]
        else:
            features = json.loads((path.parent / "dataset_info.json").read_bytes())["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, Mapping) else {}


def _chosen(path: Path, names: Sequence[str], wanted: Container[str] | None) -> list[str]:
    """The names of the columns to read; all if `wanted` is None.

    Raises:
        DataError: two columns have the same name.
    """
    if len(set(names)) != len(names):
        raise unreadable(path, f"it names a column twice: {', '.join(names)[:80]}")
    return [name for name in names if wanted is None or name in wanted]
