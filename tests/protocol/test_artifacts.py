"""A bundle, return or plug-in in hand was verified or sealed: nothing else constructs one."""

import ast
import dataclasses
from pathlib import Path

import pytest

import offsite
from artifacts import lora_return, packed
from offsite.config import PlugInSpec
from offsite.errors import UsageError
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return
from tiny import tiny_base, tiny_parties


def test_nobody_constructs_an_artifact(tmp_path: Path) -> None:
    bundle = packed(tiny_base(tmp_path / "base", blocks=3), tmp_path / "bundle", tiny_parties(tmp_path))
    for kind in (Bundle, Return, PlugIn):
        for proof in ((), (object(),), (None,), (bundle,)):
            with pytest.raises(TypeError, match="never constructed by hand"):
                kind(bundle.folder, bundle.manifest, bundle.digest, bundle.files, *proof)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(bundle, folder=tmp_path)


def test_only_verifying_and_sealing_attest() -> None:
    sources = Path(offsite.__file__).parent
    users = {
        str(file.relative_to(sources))
        for file in sources.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and any(alias.name in ("attest", "_PROOF") for alias in node.names)
    }
    assert users == {"protocol/verify.py", "protocol/sealing.py"}


def test_a_return_is_plugged_in_where_it_was_taken_in_alone(tmp_path: Path) -> None:
    """Verified by its maker, or by the owner without the ledger: neither says that the bundle permits it."""
    parties = tiny_parties(tmp_path)
    base = tiny_base(tmp_path / "base", blocks=3)
    made = lora_return(packed(base, tmp_path / "bundle", parties), tmp_path / "return", parties.data_owner)
    looked_at = offsite.verify_return(made.folder, parties.owner)
    for returned in (made, looked_at):
        with pytest.raises(UsageError, match="was not taken in by this home") as caught:
            plug_in(Base(base), returned, tmp_path / "plugged", PlugInSpec(), parties.owner)
        assert "offsite.intake" in str(caught.value.next_step)
    assert not (tmp_path / "plugged").exists()
    taken = offsite.intake(made.folder, parties.owner)
    assert plug_in(Base(base), taken, tmp_path / "plugged", PlugInSpec(), parties.owner).folder.is_dir()
