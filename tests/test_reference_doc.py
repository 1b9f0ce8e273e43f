"""docs/reference.md is what the specs render, and holds every setting of every verb."""

import pytest

from doc_scripts import DOCS, load_script
from offsite.cli.setting_flags import flag_of
from offsite.config import TABLES


@pytest.fixture(scope="module")
def rendered() -> str:
    text: str = load_script("render_reference").render()
    return text


def test_the_document_is_what_the_specs_render(rendered: str) -> None:
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == rendered, "run `make docs`"


@pytest.mark.parametrize("verb", TABLES)
def test_every_setting_is_in_it_with_its_flag_and_its_rules(verb: str, rendered: str) -> None:
    part = rendered.split(f"\n## offsite {verb}\n")[1].split("\n## offsite ")[0]
    rows = {line.split("`")[1]: line for line in part.splitlines() if line.startswith("| `")}
    settings = TABLES[verb].settings()
    assert rows.keys() == settings.keys()
    for key, setting in settings.items():
        assert (f"| `{flag_of(setting)}` |" in rows[key]) == setting.has_flag
        assert str(setting.field.description) in rows[key]
    assert all(f"- {rule.__doc__}" in part for rule in TABLES[verb].rules())
