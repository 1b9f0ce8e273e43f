"""A recipe's data set may call its fields otherwise; what the study writes is read without that setting."""

import json
from pathlib import Path

import pytest

from offsite.data.read_rows import read_rows
from offsite.errors import DataError
from offsite.study.prepare_study import write_rows
from offsite.study.recipe import DataTable


def test_columns_of_a_recipe(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n}?", "a": f"{n}.", "text": "no"}) + "\n" for n in range(3)))
    columns = {"prompt": "q", "completion": "a"}
    table = DataTable.model_validate({"name": "set", "train": rows, "test": rows, "columns": columns})
    written = write_rows(table, tmp_path / "out")
    assert [(row.prompt, row.completion) for row in read_rows(written.train)] == [
        ("0?", "0."),
        ("1?", "1."),
        ("2?", "2."),
    ]
    with pytest.raises(DataError, match="bad row"):
        write_rows(table.changed({"columns": {"prompt": "nothing", "completion": "a"}}), tmp_path / "out")
