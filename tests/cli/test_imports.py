"""What a command imports decides how fast it answers; checked in fresh processes, by module and not by the clock."""

from pathlib import Path

import pytest

from fresh_process import HEAVY, modules_after
from tiny import tiny_base, tiny_bundle, tiny_parties


def test_help_imports_nothing_heavy() -> None:
    assert not (HEAVY | {"numpy", "pydantic", "cryptography"}) & modules_after("--help")


@pytest.mark.parametrize("verb", ["pack", "tune", "eval", "compare", "generate", "doctor", "demo", "study"])
def test_help_of_a_verb_imports_no_torch(verb: str) -> None:
    assert not (HEAVY | {"cryptography"}) & modules_after(verb, "--help")


def test_verify_and_inspect_import_no_torch(tmp_path: Path) -> None:
    parties = tiny_parties(tmp_path)
    bundle = tiny_bundle(tiny_base(tmp_path / "base"), tmp_path / "bundle", parties)
    for verb in ("verify", "inspect"):
        loaded = modules_after(verb, bundle.folder, "--home", parties.data_owner.folder)
        assert not HEAVY & loaded
        assert "cryptography" in loaded  # it did verify
        assert "numpy" not in loaded  # of a bundle no number is looked at
