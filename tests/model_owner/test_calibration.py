import json
from pathlib import Path

import pytest

from offsite.config import PackSpec
from offsite.errors import DataError
from offsite.model_owner.calibration.calibration_text import read_calibration_text, row_form


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL"])
def test_rows_of_every_kind_are_calibration_text(tmp_path, name):
    file = tmp_path / name
    rows = [
        {"text": "One."},
        {"prompt": "Two", "completion": " three."},
        {"messages": [{"role": "user", "content": "Four?"}, {"role": "assistant", "content": "Five."}]},
        {"question": "Six?", "choices": ["a", "b"], "answer": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_calibration_text(file) == "One.\n\nTwo three.\n\nFour?\nFive.\n\nQuestion: Six?\nAnswer: b"


@pytest.mark.parametrize("name", ["book.txt", "README", "notes.md"])
def test_other_files_are_plain_text(tmp_path, name):
    (tmp_path / name).write_text('{"text": "One."}\n')
    assert read_calibration_text(tmp_path / name) == '{"text": "One."}\n'


def test_bad_rows_are_listed_and_no_text_is_an_error(tmp_path):
    (tmp_path / "rows.csv").write_text("txt\na\nb\n")
    with pytest.raises(DataError, match="2 bad rows") as caught:
        read_calibration_text(tmp_path / "rows.csv")
    assert "rows.csv:2: fields 'txt'" in caught.value.reasons[0]
    with pytest.raises(DataError, match="cannot read"):
        read_calibration_text(tmp_path / "none.txt")


def test_columns_of_calibration_rows_may_be_called_otherwise(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "One? ", "a": "Two."}\n{"q": "Three? ", "a": "Four.", "label": false}\n')
    spec = PackSpec(calibration=rows, columns="prompt=q,completion=a")
    assert read_calibration_text(rows, row_form(spec)) == "One? Two."
