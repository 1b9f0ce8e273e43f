"""docs/data.md: its examples are rows, and it names every form that is read."""

import json
import re
from pathlib import Path

import pytest

from offsite.config import EvalSpec, TuneSpec
from offsite.config.setting_types import COLUMN_NAMES
from offsite.data.conversations.parse_messages import OTHER_NAMES, REASONING_KEYS, ROLES
from offsite.data.data_files import TEST, TRAINING, VALIDATION
from offsite.data.file_formats import RECORDS
from offsite.data.parse_row import FIELDS, parse_row
from offsite.data.row import Row, RowForm
from offsite.data.text_files import COMPRESSED

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.search(r"```json\n(.*?)```", DOC, re.DOTALL)[1].splitlines()


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_are_rows(line):
    row = parse_row(json.loads(line), 1, RowForm(chosen="chosen" in line))
    assert isinstance(row, Row)
    assert any(word in row.whole_text for word in ("Paris.", "humans", "bunnies", "fromage", "rows."))


@pytest.mark.parametrize("columns", re.findall(r"`--columns ([a-z_=,]+)`", DOC))
@pytest.mark.parametrize("spec", [TuneSpec, EvalSpec])
def test_examples_of_columns_are_settings(columns, spec):
    pairs = dict(pair.split("=") for pair in columns.split(","))
    assert spec(columns=columns).values()["columns"] == pairs


def test_every_form_is_named():
    names = {*ROLES, *OTHER_NAMES, *REASONING_KEYS, *FIELDS, *RECORDS, *COMPRESSED, *TRAINING, *VALIDATION, *TEST}
    missing = sorted(name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}\b", DOC))
    assert missing == []


def test_columns_may_be_named_for_the_fields_that_are_read():
    assert set(COLUMN_NAMES) - {"image", "path", "label"} <= FIELDS
