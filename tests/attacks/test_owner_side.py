"""What stands between a return and the base besides verification: the key's mode, the ledger, the numbers."""

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from artifacts import edit_weights, sign_again
from attacks.lab import Lab
from attacks.test_broken_files import spoiled
from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError, OffsiteError, PolicyError, StorageError, UsageError, VerificationError
from offsite.model_owner import ledger
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import read_unverified, verify_plug_in


def plugged(lab: Lab, returned: Path, out: str = "out", **spec: object) -> Path:
    made = plug_in(
        Base(lab.folder / "base"),
        intake(returned, lab.parties.owner),
        lab.folder / out,
        PlugInSpec.model_validate(spec),
        lab.parties.owner,
    )
    return made.folder


def times(lab: Lab, target: str = "lora") -> int:
    with sqlite3.connect(lab.parties.owner.ledger) as db:
        return int(db.execute("SELECT count(*) FROM plug_ins").fetchone()[0])


@pytest.mark.skipif(os.name != "posix", reason="modes of files are a matter of POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o777])
def test_private_key_that_others_can_read(lab: Lab, mode: int) -> None:
    (lab.parties.owner.folder / "key.pem").chmod(mode)
    with pytest.raises(OffsiteError, match="is readable by others") as caught:
        lab.parties.owner.identity()
    assert "chmod 600" in (caught.value.next_step or "")


@pytest.mark.skipif(os.name != "posix", reason="modes of files are a matter of POSIX")
def test_key_and_ledger_are_nobody_elses(lab: Lab) -> None:
    plugged(lab, lab.lora)
    for name in ("key.pem", "ledger.sqlite"):
        assert (lab.parties.owner.folder / name).stat().st_mode & 0o777 == 0o600


def test_second_plug_in(lab: Lab) -> None:
    first = plugged(lab, lab.lora)
    digest = verify_plug_in(first, lab.parties.owner).manifest.returned
    with pytest.raises(PolicyError, match="was plugged in before") as caught:
        plugged(lab, lab.lora, "second")
    assert caught.value.exit_code == 5
    assert "--again" in (caught.value.next_step or "")
    assert not (lab.folder / "second").exists()
    assert [state for state, _ in Ledger(lab.parties.owner.ledger).intakes(digest)][-1] == "refused"
    assert plugged(lab, lab.lora, "second", again=True).is_dir()
    assert times(lab) == 2


def test_second_plug_in_in_another_form(lab: Lab) -> None:
    plugged(lab, lab.lora, **{"as": "adapter"})
    with pytest.raises(PolicyError):
        plugged(lab, lab.lora, "second", **{"as": "merged"})


def test_another_base(lab: Lab) -> None:
    edit_weights(
        lab.folder / "base" / "model.safetensors", lambda w: w.update({"model.norm.weight": np.ones(32, np.float32)})
    )
    with pytest.raises(IncompatibleError, match="is not the base that this bundle was packed from") as caught:
        plugged(lab, lab.lora)
    assert caught.value.exit_code == 4
    assert not (lab.folder / "out").exists()
    assert times(lab) == 0


def test_base_of_another_family(lab: Lab) -> None:
    taken = intake(lab.lora, lab.parties.owner)
    with pytest.raises(IncompatibleError):
        plug_in(Base(lab.folder / "gpt2"), taken, lab.folder / "out", PlugInSpec(), lab.parties.owner)


def test_finite_numbers_whose_product_is_not(lab: Lab) -> None:
    """Every number of the adapter is finite, A times B is not: the merged model would be poisoned."""

    def huge(weights: dict) -> None:
        for value in weights.values():
            value[...] = 1e30

    edit_weights(lab.lora / ADAPTER_WEIGHTS, huge)
    lab.sign_lora()
    with pytest.raises(VerificationError, match="would hold NaN or infinity") as caught:
        plugged(lab, lab.lora, **{"as": "merged"})
    assert caught.value.exit_code == 3
    assert not (lab.folder / "out").exists()
    manifest = read_unverified(lab.lora)
    assert manifest.kind == "return"
    with sqlite3.connect(lab.parties.owner.ledger) as db:
        states = [row[0] for row in db.execute("SELECT state FROM returns ORDER BY id")]
    assert states == ["accepted", "refused"]
    assert times(lab) == 0


def test_full_return_as_an_adapter(lab: Lab) -> None:
    with pytest.raises(UsageError, match="no adapter folder can carry") as caught:
        plugged(lab, lab.full, **{"as": "adapter"})
    assert caught.value.exit_code == 2


def test_refused_return_is_not_plugged_in(lab: Lab) -> None:
    sign_again(lab.lora, lab.carol, signer=lab.carol.public_key.hex)
    with pytest.raises(VerificationError):
        plugged(lab, lab.lora)
    assert not (lab.folder / "out").exists()
    assert times(lab) == 0


@pytest.mark.skipif(os.name != "posix", reason="pipes and links are a matter of POSIX")
@pytest.mark.parametrize("how", ["pipe", "folder", "link"])
def test_manifest_that_is_no_plain_file_is_refused_and_entered(lab: Lab, how: str) -> None:
    """A pipe would be read for ever."""
    spoiled(lab.lora / MANIFEST, how)
    with pytest.raises(VerificationError, match="not a plain file"):
        plugged(lab, lab.lora)
    with sqlite3.connect(lab.parties.owner.ledger) as db:
        assert db.execute("SELECT digest, state FROM returns").fetchall() == [("", "refused")]


def test_two_plug_ins_at_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that the return was never plugged in; the second to be entered is refused all the same."""
    plugged(lab, lab.lora)
    monkeypatch.setattr(Ledger, "plugged_in", lambda *_: [])  # as it was when the second one looked
    with pytest.raises(PolicyError, match="was plugged in before"):
        plugged(lab, lab.lora, "second")
    assert not (lab.folder / "second").exists()
    assert times(lab) == 1


def test_no_plug_in_appears_that_the_ledger_does_not_hold(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the ledger."""
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.2)
    plugged(lab, lab.full)  # so that the ledger is there
    other = sqlite3.connect(lab.parties.owner.ledger, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="cannot use the ledger"):
        plugged(lab, lab.lora, "second")
    other.close()
    assert not (lab.folder / "second").exists()


def test_interrupted_once_the_folder_is_there(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in stands, so the ledger goes on to hold it."""

    real = os.open

    def interrupt(path: Path, *more: int) -> int:
        if path == lab.folder:  # opened to be flushed to the disk
            raise KeyboardInterrupt
        return real(path, *more)

    monkeypatch.setattr(os, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plugged(lab, lab.lora)
    assert (lab.folder / "out" / MANIFEST).exists()
    assert times(lab) == 1


def test_ledger_of_another_version(lab: Lab) -> None:
    with sqlite3.connect(lab.parties.owner.ledger) as db:
        for (raw,) in db.execute("SELECT manifest FROM bundles").fetchall():
            later = json.dumps(json.loads(raw) | {"format": 2}).encode()
            db.execute("UPDATE bundles SET manifest = ? WHERE manifest = ?", (later, raw))
    with pytest.raises(StorageError, match="a bundle that this version cannot read"):
        plugged(lab, lab.lora)


def test_output_folder_that_holds_something(lab: Lab) -> None:
    (lab.folder / "out").mkdir()
    (lab.folder / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an empty folder"):
        plugged(lab, lab.lora)
    assert (lab.folder / "out" / "precious.txt").read_text() == "mine"


def test_ledger_that_cannot_be_written(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plug-in without its entry: were it made first, a second one would pass unseen."""
    real = Ledger.recording_plug_in

    def full(self: Ledger, made: object, **settings: object) -> object:
        raise StorageError("the ledger's disk is full")

    monkeypatch.setattr(Ledger, "recording_plug_in", full)
    with pytest.raises(StorageError):
        plugged(lab, lab.lora)
    assert not (lab.folder / "out").exists()
    monkeypatch.setattr(Ledger, "recording_plug_in", real)
    assert plugged(lab, lab.lora).is_dir()  # nor was it entered, so that no --again is needed


def test_ledger_that_is_none(lab: Lab) -> None:
    lab.parties.owner.ledger.write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match="cannot use the ledger") as caught:
        plugged(lab, lab.lora)
    assert caught.value.exit_code == 1
    assert caught.value.next_step
