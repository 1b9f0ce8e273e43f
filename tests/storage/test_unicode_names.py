import unicodedata
from pathlib import Path

import pytest

from offsite.storage.unicode_names import existing

NAME = "Universit\u00e4t/Mod\u00e8les"


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("typed", ["NFC", "NFD"])
def test_a_path_in_the_other_form_of_unicode(stored: str, typed: str, tmp_path: Path) -> None:
    there = tmp_path / unicodedata.normalize(stored, NAME)  # type: ignore[arg-type]
    there.mkdir(parents=True)
    assert existing(tmp_path / unicodedata.normalize(typed, NAME)) == there  # type: ignore[arg-type]


def test_each_folder_may_have_another_form(tmp_path: Path) -> None:
    there = tmp_path / unicodedata.normalize("NFD", "\u00e4") / unicodedata.normalize("NFC", "\u00e9")
    there.mkdir(parents=True)
    assert existing(tmp_path / unicodedata.normalize("NFC", "\u00e4") / unicodedata.normalize("NFD", "\u00e9")) == there


def test_what_is_nowhere_stays_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("n\u00e4"), tmp_path / "n\u00e4", Path(), Path("x" * 300), Path("../n\u00e4")):
        assert existing(path) == path
