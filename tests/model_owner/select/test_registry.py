"""Every file with a selection rule is registered under a name, and has the one function that a rule has."""

import inspect
from pathlib import Path

import pytest

from offsite.model_owner import select
from offsite.model_owner.select.selection import SELECTORS, Selector, selector

OTHERS = {"__init__", "selection", "select_blocks"}  # what all rules share


@pytest.mark.parametrize("name", SELECTORS)
def test_a_registered_rule_has_a_file_that_selects(name: str) -> None:
    found = selector(name)
    assert isinstance(found, Selector)
    assert list(inspect.signature(found.select).parameters) == ["selection"]


def test_every_rule_is_registered() -> None:
    files = {file.stem for file in Path(str(select.__file__)).parent.glob("*.py")}
    assert files - OTHERS == set(SELECTORS.values())
