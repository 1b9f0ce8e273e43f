"""Rows that mark answers as good or bad, as KTO's sets do: the good ones are used, the others counted and reported."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from offsite.data.parse_row import parse_row, with_our_names
from offsite.data.row import Row, RowForm
from offsite.data.tokens import encode
from offsite.errors import DataError
from tiny import tiny_tokenizer

ANSWER = {"prompt": "a", "completion": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({**ANSWER, "label": True}, True),
        ({**ANSWER, "label": False}, False),
        ({**ANSWER, "label": "False"}, False),
        ({**ANSWER, "label": "true"}, True),
        ({**ANSWER, "label": 0}, False),
        ({**ANSWER, "label": 1}, True),
        ({**ANSWER, "label": None}, True),
        ({"messages": TURNS, "label": False}, False),
        ({"messages": TURNS, "kto_tag": False}, False),
        ({"conversations": TURNS, "kto_tag": True}, True),
        ({"prompt": TURNS[:1], "completion": TURNS[1:], "label": False}, False),
        ({"instruction": "a", "output": "b", "kto_tag": False}, False),
        ({**ANSWER, "label": "positive"}, True),
        ({"text": "a review", "label": 0}, True),
    ],
)
def test_which_rows_are_used(fields: dict[str, Any], used: bool) -> None:
    row = parse_row(fields, 1)
    assert isinstance(row, Row)
    assert (row.left_out == "") is used


def test_a_label_that_is_another_field() -> None:
    """AG News as a generator of its labels, and HellaSwag."""
    generated = parse_row({"text": "a", "label": 0}, 1, RowForm({"prompt": "text", "completion": "label"}))
    fields = {"ctx": "a", "endings": ["b", "c"], "label": 0}
    chosen = parse_row(fields, 1, RowForm({"question": "ctx", "choices": "endings", "answer": "label"}))
    for row in (generated, chosen):
        assert isinstance(row, Row)
        assert row.left_out == ""


def test_columns_may_be_called_otherwise() -> None:
    form = RowForm({"prompt": "q", "completion": "a"})
    row = parse_row({"q": "x", "a": "y", "label": False}, 1, form)
    assert isinstance(row, Row)
    assert row.left_out


def test_they_are_counted_and_reported(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    rows = [parse_row({**ANSWER, "label": label}, 1) for label in (True, False, False)]
    kept = [row for row in rows if isinstance(row, Row)]
    encoded = encode(kept, tokenizer, source=tmp_path, max_length=64)
    assert (len(encoded.examples), encoded.skipped) == (1, 2)
    (report,) = encoded.reports()
    assert report == "rows left out because their label is false (answers that are not wanted): 2"
    with pytest.raises(DataError, match="no row") as caught:
        encode(kept[1:], tokenizer, source=tmp_path, max_length=64)
    assert report in caught.value.reasons


def test_records_under_our_names() -> None:
    form = RowForm({"prompt": "q", "completion": "a"})
    assert with_our_names({"q": "x", "a": 3, "text": "z"}, form) == {"prompt": "x", "completion": "3"}
    assert with_our_names({"q": "x", "choices": ["a"]}, RowForm({"question": "q"})) == {
        "question": "x",
        "choices": ["a"],
    }
    assert with_our_names({"text": "z"}, RowForm()) == {"text": "z"}
