"""Data sets -> rows. docs/data.md shows an example of every kind; `offsite.data.parse_row` interprets the fields."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from offsite.data.data_files import DataPaths, Part, files_of, name_of, paths_of
from offsite.data.file_formats import read_records
from offsite.data.parse_row import FIELDS, parse_row
from offsite.data.row import Row, RowForm
from offsite.data.text_files import EXPECTED, kind, read_text
from offsite.errors import DataError

_LISTED = 20  # the largest number of problems that an error lists
_EXAMPLE = '{"prompt": "...", "completion": "..."} or {"text": "..."}; docs/data.md has the others'


def read_rows(data: DataPaths, form: RowForm | None = None, part: Part = "train") -> list[Row]:
    """Read data sets and join their rows.

    Args:
        data: files, folders or patterns, as docs/data.md lists them.
        form: the settings that say what the fields mean; None: their names alone say it.
        part: for a data set with several parts, whether to read the training part or the held-out part.

    Raises:
        DataError: a data set cannot be read, has no row, or has bad rows; each is listed with its file, line and field.
        UsageError: the format needs a package that is not installed.
    """
    rows: list[Row] = []
    problems: list[tuple[str, str]] = []
    for path in paths_of(data):
        for file in files_of(path, part):
            for row in _rows_in(file, form or RowForm(), path if path.is_dir() and path == file else file):
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    problems.append(row)
    if problems:
        raise DataError(
            f"{counted(problems, 'bad row')} in {name_of(data)}",
            reasons=_listed(problems, every=not rows),
            next_step=f"correct these rows, or name the columns with --columns; a row is {_EXAMPLE}",
        )
    if not rows:
        raise DataError(
            f"the data set {name_of(data)} is empty", next_step=f"write {EXPECTED} with rows such as {_EXAMPLE}"
        )
    return rows


def _rows_in(file: Path, form: RowForm, shown: Path) -> Iterator[Row | tuple[str, str]]:
    """Yields the rows of one file; for a bad row a pair of texts instead: "file:line", and its problem."""
    if kind(file) == ".txt":
        yield Row(1, None, read_text(file), document=True, file=file)
        return
    wanted = FIELDS | set(form.columns.values())
    for record in read_records(file, wanted):
        row = record.fields if isinstance(record.fields, str) else parse_row(record.fields, record.number, form)
        yield replace(row, file=record.file) if isinstance(row, Row) else (f"{record.file}:{record.number}", row)


def _listed(problems: Sequence[tuple[str, str]], *, every: bool) -> list[str]:
    """One text for each problem, from pairs of "file:line" and problem.

    With `every`, all rows that were read are bad; if they then have the same problem, it is listed once.
    """
    place, what = problems[0]
    if every and len(problems) > 1 and all(other == what for _, other in problems):
        return [f"{place}: {what}", f"and the same of {len(problems) - 1} more"]
    return first([f"{place}: {what}" for place, what in problems])


def counted(items: Sequence[object], word: str) -> str:
    """A count with its noun, such as "1 row" or "2 rows"."""
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def first(lines: Sequence[str]) -> list[str]:
    """The first 20 lines of a list of problems, and a last line with the number of the others if there are more."""
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
