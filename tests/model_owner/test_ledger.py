"""What the owner remembers."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from artifacts import edit_weights, lora_return, packed, sign_again
from offsite.config import PackSpec, PlugInSpec
from offsite.errors import OffsiteError, PolicyError, StorageError
from offsite.model_owner.base_shares import BaseShares
from offsite.model_owner.carry_map import CarryMap
from offsite.model_owner.emulator_score import EmulatorScore
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger, returned_digest
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.model_owner.tuning_arithmetic import TuningArithmetic
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.protocol.manifest import PlugInManifest
from offsite.protocol.sealing import seal
from offsite.storage.staging_claims import claimed
from tiny import MakeBase, Parties


def test_states(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    ledger = Ledger(parties.owner.ledger)

    def state() -> str:
        issued = ledger.issued(bundle.digest)
        assert issued is not None
        return issued.state

    assert state() == "issued"
    ledger.record_intake(returned.digest, bundle.digest, ["changed bytes"])
    assert state() == "issued"
    ledger.record_intake(returned.digest, bundle.digest)
    assert state() == "returned"
    manifest = PlugInManifest(
        kind="plug-in", format=1, requires=(), files=(), form="adapter", architecture="llama",
        base=bundle.manifest.base, bundle=bundle.digest, returned=returned.digest, issuer=bundle.manifest.issuer,
    )  # fmt: skip
    (tmp_path / "staged").mkdir()
    made = seal(tmp_path / "staged", manifest, parties.owner.identity(), tmp_path / "plugged")
    with pytest.raises(ZeroDivisionError), ledger.recording_plug_in(made, again=False):
        _ = 1 / 0
    assert state() == "returned"
    assert ledger.plugged_in(returned) == []
    with ledger.recording_plug_in(made, again=False):
        pass
    assert state() == "plugged in"
    assert len(ledger.plugged_in(returned)) == 1
    ledger.record_intake(returned.digest, bundle.digest)
    assert state() == "plugged in"
    assert [s for s, _ in ledger.intakes(returned.digest)] == ["refused", "accepted", "accepted"]
    assert ledger.intakes(returned.digest)[0] == ("refused", ["changed bytes"])


def test_unknown_digests(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "home" / "ledger.sqlite")
    assert ledger.issued("0" * 64) is None
    assert ledger.intakes("0" * 64) == []
    assert ledger.path.stat().st_mode & 0o077 == 0


def test_bundle_packed_twice_within_a_second(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    ledger = Ledger(parties.owner.ledger)
    ledger.record_issue(
        bundle, "hospital", CarryMap.of((0, 1, 4)), BaseShares(3, 2, 1), TuningArithmetic(4, 3, 2, 5, 1), PackSpec()
    )
    issued = ledger.issued(bundle.digest)
    assert issued is not None
    assert issued.kept == (0, 1, 4)


def test_what_is_written_about_a_bundle(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    packed(base_of(), tmp_path / "bundle", parties, keep=2)
    with sqlite3.connect(parties.owner.ledger) as db:
        [(name, kept, settings)] = db.execute("SELECT recipient_name, kept, settings FROM bundles").fetchall()
    db.close()
    assert (name, kept) == ("hospital", "[0, 1, 3, 4]")
    assert PackSpec.model_validate_json(settings).select.keep == 2


def test_ledger_with_another_document(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    with sqlite3.connect(parties.owner.ledger) as db:
        db.execute("UPDATE bundles SET manifest = ?", ((returned.folder / "offsite.json").read_bytes(),))
    db.close()
    with pytest.raises(StorageError, match="another kind of document"):
        Ledger(parties.owner.ledger).issued(bundle.digest)


def test_ledger_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(StorageError, match="cannot use the ledger") as caught:
        Ledger(tmp_path / "ledger.sqlite").issued("0" * 64)
    assert isinstance(caught.value, OffsiteError)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Ledger(tmp_path / "file" / "ledger.sqlite").issued("0" * 64)


def test_two_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    workers = [threading.Thread(target=lambda i=i: ledger.record_intake(f"{i:064}", None, ["no"])) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(ledger.intakes(f"{i:064}") == [("refused", ["no"])] for i in range(8))


def test_a_ledger_from_before_strengths_and_checkpoints(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """What was entered then was of strength 1 and of the one checkpoint."""
    packed(base_of(), tmp_path / "bundle", parties, keep=1)
    with sqlite3.connect(parties.owner.ledger) as db:
        db.execute("ALTER TABLE plug_ins DROP COLUMN strength")
        db.execute("ALTER TABLE plug_ins DROP COLUMN checkpoint")
        db.execute(
            "INSERT INTO plug_ins (digest, returned, bundle, made_at, form) VALUES ('a', 'b', 'c', 'd', 'merged')"
        )
    db.close()
    assert Ledger(parties.owner.ledger).issued("0" * 64) is None
    with sqlite3.connect(parties.owner.ledger) as db:
        assert db.execute("SELECT strength, checkpoint FROM plug_ins").fetchall() == [(1.0, 1)]
    db.close()


def test_ledger_without_maps_gains_the_column(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    ledger = Ledger(parties.owner.ledger)
    with sqlite3.connect(ledger.path) as db:
        db.execute("ALTER TABLE bundles DROP COLUMN carry")
        db.execute("ALTER TABLE bundles DROP COLUMN shares")
    db.close()
    issued = ledger.issued(bundle.digest)
    assert issued is not None
    assert (issued.carry, issued.shares, issued.kept) == (None, None, (0, 1, 4))


def test_a_map_of_another_bundle_is_refused(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    first = packed(base_of(), tmp_path / "first", parties, keep=1)
    second = packed(base_of(), tmp_path / "second", parties, keep=2)
    ledger = Ledger(parties.owner.ledger)
    with sqlite3.connect(ledger.path) as db:
        db.execute(
            "UPDATE bundles SET carry = (SELECT carry FROM bundles WHERE digest = ?) WHERE digest = ?",
            (first.digest, second.digest),
        )
    db.close()
    with pytest.raises(StorageError, match="restore the ledger from a backup") as caught:
        ledger.issued(second.digest)
    assert caught.value.reasons == (f"its map is the one of bundle {first.digest[:12]}",)


KILLED = """
import os, signal, sys
from pathlib import Path
from offsite.config import PlugInSpec
from offsite.model_owner import ledger as module
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
base, returned, out, home, when = map(Path, sys.argv[1:])
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if when.name == "before":
    Path.rename = kill
taken = intake(returned, Home(home))
made = module.Ledger.recording_plug_in
if when.name == "after":
    import contextlib
    @contextlib.contextmanager
    def recording(*args, **kwargs):
        with made(*args, **kwargs):
            yield
            kill()
    module.Ledger.recording_plug_in = recording
plug_in(Base(base), taken, out, PlugInSpec(as_="adapter"), Home(home))
"""


@pytest.mark.skipif(os.name != "posix", reason="a killed process is told by a lock on a folder")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_the_rename_of_a_plug_in(when: str, base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """The next run settles it: killed before the rename nothing was made, after it the plug-in is there."""
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    lora_return(bundle, tmp_path / "return", parties.data_owner)
    words = [base_of(), tmp_path / "return", tmp_path / "plugged", parties.owner.folder, when]
    ended = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "plugged").exists() == (when == "after")
    taken = intake(tmp_path / "return", parties.owner)
    if when == "after":
        with pytest.raises(PolicyError, match="was plugged in before"):
            plug_in(Base(base_of()), taken, tmp_path / "again", PlugInSpec(as_="adapter"), parties.owner)
        return
    plug_in(Base(base_of()), taken, tmp_path / "plugged", PlugInSpec(as_="adapter"), parties.owner)
    assert len(Ledger(parties.owner.ledger).plugged_in(taken)) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_record_of_a_bundle_that_never_appeared_is_deleted(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    ledger, left = Ledger(parties.owner.ledger), tmp_path / ".bundle.12345678.tmp"
    for exists in (False, True):
        with sqlite3.connect(ledger.path) as db:
            db.execute("UPDATE bundles SET staging = ?", (str(left),))
        db.close()
        if exists and os.name == "posix":
            left.mkdir()
            with claimed(left):  # the process that packs is at work
                ledger.settle()
            assert ledger.issued(bundle.digest) is not None
        ledger.settle()
        assert (ledger.issued(bundle.digest) is None) == (exists and os.name == "posix")


def test_the_same_tensors_in_other_files_are_the_same_return(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=1)
    first = lora_return(bundle, tmp_path / "first", parties.data_owner, seed=1)
    other = lora_return(bundle, tmp_path / "other", parties.data_owner, seed=2)
    shutil.copytree(tmp_path / "first", tmp_path / "same")
    edit_weights(tmp_path / "same" / ADAPTER_WEIGHTS, lambda arrays: arrays.update(reversed(list(arrays.items()))))
    sign_again(tmp_path / "same", parties.data_owner.identity())
    taken = [intake(tmp_path / name, parties.owner) for name in ("first", "same", "other")]
    assert taken[0].digest != taken[1].digest
    digests = [returned_digest(one, 1) for one in taken]
    assert digests[0] == digests[1] != digests[2]
    assert (first.digest, other.digest) == (taken[0].digest, taken[2].digest)
    spec = PlugInSpec(as_="adapter")
    plug_in(Base(base_of()), taken[0], tmp_path / "plugged", spec, parties.owner)
    with pytest.raises(PolicyError, match="was plugged in before"):
        plug_in(Base(base_of()), taken[1], tmp_path / "again", spec, parties.owner)
    plug_in(Base(base_of()), taken[2], tmp_path / "another", spec, parties.owner)


@pytest.mark.parametrize(
    ("column", "kind"), [("shares", "BaseShares"), ("arithmetic", "TuningArithmetic"), ("score", "EmulatorScore")]
)
def test_values_of_a_bundle_come_back_and_malformed_ones_are_named(
    base_of: MakeBase, parties: Parties, tmp_path: Path, column: str, kind: str
) -> None:
    bundle, ledger = packed(base_of(), tmp_path / "bundle", parties, keep=1), Ledger(parties.owner.ledger)
    ledger.record_score(bundle.digest, EmulatorScore(1.5, 2.0, 0.4, 0.6, 99, fitted=False, text="a manual"))
    issued = ledger.issued(bundle.digest)
    assert issued is not None
    assert issued.score == EmulatorScore(1.5, 2.0, 0.4, 0.6, 99, fitted=False, text="a manual")
    assert issued.shares is not None
    assert sum(issued.shares.fractions.values()) == pytest.approx(1)
    assert issued.arithmetic is not None
    with sqlite3.connect(parties.owner.ledger) as db:
        db.execute(f"UPDATE bundles SET {column} = ?", ('{"other": 1}',))
    db.close()
    with pytest.raises(StorageError, match="cannot read") as caught:
        ledger.issued(bundle.digest)
    assert f"its {kind} is malformed" in caught.value.reasons[0]
