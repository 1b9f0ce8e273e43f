"""The model owner's record of every issued bundle, received return and plug-in: an SQLite file in the home folder."""

import datetime
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from offsite.config import PackSpec
from offsite.errors import PolicyError, StorageError
from offsite.model_owner.base_shares import BaseShares
from offsite.model_owner.carry_map import CarryMap, parse_carry_map, render_carry_map
from offsite.model_owner.emulator_score import EmulatorScore
from offsite.model_owner.tuning_arithmetic import TuningArithmetic
from offsite.protocol.artifacts import Bundle, PlugIn, Return
from offsite.protocol.contents import CLASSIFIER, WEIGHTS_OF, checkpoint_file
from offsite.protocol.manifest import MANIFEST, BundleManifest, parse_manifest, render_manifest
from offsite.storage.staging_claims import is_abandoned

V = TypeVar("V")
LOCK_SECONDS = 30.0  # how long a command waits while another one writes to the ledger
_SCHEMA = """
CREATE TABLE IF NOT EXISTS bundles (
    digest TEXT PRIMARY KEY,
    issued_at TEXT NOT NULL,
    recipient_name TEXT NOT NULL,
    base TEXT NOT NULL,
    kept TEXT NOT NULL,       -- JSON: which base blocks the bundle holds, in order; known to nobody else
    settings TEXT NOT NULL,   -- JSON: the PackSpec
    manifest BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'returned', 'plugged in')),
    carry TEXT,               -- JSON: the CarryMap; known to nobody else
    shares TEXT,              -- JSON: the BaseShares
    arithmetic TEXT,          -- JSON: the TuningArithmetic
    score TEXT,               -- JSON: the EmulatorScore; known to nobody else
    staging TEXT              -- the temporary folder, until the bundle's folder has its final name
);
CREATE TABLE IF NOT EXISTS returns (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    bundle TEXT,
    received_at TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('accepted', 'refused')),
    reasons TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS plug_ins (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    returned TEXT NOT NULL,
    bundle TEXT NOT NULL REFERENCES bundles(digest),
    made_at TEXT NOT NULL,
    form TEXT NOT NULL,
    strength REAL NOT NULL DEFAULT 1,
    checkpoint INTEGER NOT NULL DEFAULT 1,
    tensors TEXT,             -- digest of the tensors that were plugged in
    staging TEXT              -- the temporary folder, until the plug-in's folder has its final name
);
"""
_PENDING = (  # by table: the records whose artifact may be missing, and what deletes or keeps one
    (
        "SELECT rowid, digest, staging FROM bundles WHERE staging IS NOT NULL",
        "DELETE FROM bundles WHERE rowid = ?",
        "UPDATE bundles SET staging = NULL WHERE rowid = ?",
    ),
    (
        "SELECT id, bundle, staging FROM plug_ins WHERE staging IS NOT NULL",
        "DELETE FROM plug_ins WHERE id = ?",
        "UPDATE plug_ins SET staging = NULL WHERE id = ?",
    ),
)
_NOT_PLUGGED_IN = (  # after a record of a plug-in was deleted
    "UPDATE bundles SET state = 'returned' WHERE digest = ? AND state = 'plugged in'"
    " AND NOT EXISTS (SELECT 1 FROM plug_ins WHERE bundle = ?)"
)
# Columns that older ledgers lack, by table.
_ADDED = {
    "plug_ins": {
        "strength": "REAL NOT NULL DEFAULT 1",
        "checkpoint": "INTEGER NOT NULL DEFAULT 1",
        "tensors": "TEXT",
        "staging": "TEXT",
    },
    "bundles": {"carry": "TEXT", "shares": "TEXT", "arithmetic": "TEXT", "score": "TEXT", "staging": "TEXT"},
}


@dataclass(frozen=True)
class Issued:
    """The ledger's record of a bundle; `kept` are the base indices of its blocks, in order.

    `state` is "issued", "returned" or "plugged in". `carry`, `shares` and `arithmetic` are None for bundles of earlier
    versions, and `score` for those that were not scored.
    """

    digest: str
    manifest: BundleManifest
    kept: tuple[int, ...]
    state: str
    carry: CarryMap | None = None
    shares: BaseShares | None = None
    arithmetic: TuningArithmetic | None = None
    score: EmulatorScore | None = None


@dataclass(frozen=True)
class Ledger:
    """The ledger file at a path, which the first access creates."""

    path: Path

    def record_issue(
        self,
        bundle: Bundle,
        recipient_name: str,
        carry: CarryMap,
        shares: BaseShares,
        arithmetic: TuningArithmetic | None,
        spec: PackSpec,
        staging: Path | None = None,
    ) -> None:
        """Record a new bundle; call it before the bundle's folder is moved to its final path.

        Args:
            bundle: the signed bundle.
            recipient_name: the name under which the owner's home stores the recipient's public key.
            carry: the map from the bundle's blocks and layers to the base's.
            shares: how many of the base's parameters the bundle sends.
            arithmetic: the multiply-adds of tuning the bundle, and of the base; None if they are not known.
            spec: the settings of packing.
            staging: the temporary folder that will be moved; None if the bundle is at its final path.
        """
        with self._open() as db:
            db.execute(
                # a bundle packed twice within one second is identical and has the same digest
                "INSERT INTO bundles (digest, issued_at, recipient_name, base, kept, settings, manifest, state, carry,"
                " shares, arithmetic, staging) VALUES (?, ?, ?, ?, ?, ?, ?, 'issued', ?, ?, ?, ?)"
                " ON CONFLICT (digest) DO NOTHING",
                (
                    bundle.digest,
                    bundle.manifest.issued_at,
                    recipient_name,
                    bundle.manifest.base,
                    json.dumps([block.base for block in carry.blocks]),
                    json.dumps(spec.flat()),
                    render_manifest(bundle.manifest),
                    render_carry_map(carry, bundle.digest),
                    json.dumps(asdict(shares)),
                    json.dumps(asdict(arithmetic)) if arithmetic else None,
                    None if staging is None else str(staging.absolute()),
                ),
            )

    def settle(self) -> None:
        """Delete the records of bundles and plug-ins whose process was killed before their folder had its final name.

        Call it before the temporary folders of killed processes are removed.
        """
        if not self.path.exists():
            return
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            for find, delete, keep in _PENDING:
                for row, bundle, staging in db.execute(find).fetchall():
                    if is_abandoned(Path(staging)):
                        db.execute(delete, (row,))
                        db.execute(_NOT_PLUGGED_IN, (bundle, bundle))
                    elif not Path(staging).exists():
                        db.execute(keep, (row,))

    def issued(self, digest: str) -> Issued | None:
        """The record of the bundle with this digest; None if this home never issued it.

        Raises:
            StorageError: the ledger cannot be read, or the record is of an unknown version.
        """
        with self._open() as db:
            row = db.execute(
                "SELECT manifest, kept, state, carry, shares, arithmetic, score FROM bundles WHERE digest = ?",
                (digest,),
            )
            found = row.fetchone()
        if found is None:
            return None
        try:
            manifest, kept = parse_manifest(found[0]), tuple(json.loads(found[1]))
            carry = None if found[3] is None else parse_carry_map(found[3], digest)
            shares = _value(BaseShares, found[4])
            arithmetic = _value(TuningArithmetic, found[5])
            score = _value(EmulatorScore, found[6])
        except ValueError as problem:
            raise StorageError(
                f"the ledger {self.path} holds a bundle that this version cannot read",
                reasons=[str(problem)],
                next_step="use the version of offsite that issued the bundle, or restore the ledger from a backup",
            ) from None
        if not isinstance(manifest, BundleManifest):
            raise StorageError(
                f"the ledger {self.path} holds another kind of document as a bundle",
                next_step="restore the ledger from a backup",
            )
        return Issued(digest, manifest, kept, found[2], carry, shares, arithmetic, score)

    def record_score(self, digest: str, score: EmulatorScore) -> None:
        """Record the losses of a bundle's emulator and of its base; `digest` is the bundle's."""
        with self._open() as db:
            db.execute("UPDATE bundles SET score = ? WHERE digest = ?", (json.dumps(asdict(score)), digest))

    def record_intake(self, digest: str, bundle: str | None, reasons: Sequence[str] = ()) -> None:
        """Record a received return as refused if there are `reasons`, else as accepted.

        Args:
            digest: the return's digest.
            bundle: the digest of its bundle; None if this home never issued that bundle.
            reasons: why the return was refused; empty if it was accepted.
        """
        state = "refused" if reasons else "accepted"
        with self._open() as db:
            db.execute(
                "INSERT INTO returns (digest, bundle, received_at, state, reasons) VALUES (?, ?, ?, ?, ?)",
                (digest, bundle, _now(), state, json.dumps(list(reasons))),
            )
            if not reasons:
                db.execute("UPDATE bundles SET state = 'returned' WHERE digest = ? AND state = 'issued'", (bundle,))

    @contextmanager
    def recording_plug_in(
        self, plug_in: PlugIn, *, again: bool, tensors: str | None = None, staging: Path | None = None
    ) -> Iterator[None]:
        """Context manager: record a plug-in, then run the body, which must move the plug-in's folder to its final path.

        If the body fails and the folder is not there, the record is deleted. If the process is killed in the body, a
        record without a folder can remain until the next `settle`, but never a folder without a record.

        Args:
            plug_in: the signed plug-in.
            again: whether the return may have been plugged in before.
            tensors: the digest of the tensors that are plugged in, see `returned_digest`; None if it is not known.
            staging: the temporary folder that the body moves.

        Raises:
            PolicyError: the return, or one with the same tensors, was already plugged in, and `again` is false.
        """
        manifest = plug_in.manifest
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")  # no other process can record between check and insert
            earlier = _made_at(db, manifest.returned, manifest.bundle, tensors)
            if earlier and not again:
                raise plugged_in_before(earlier)
            (before,) = db.execute("SELECT state FROM bundles WHERE digest = ?", (manifest.bundle,)).fetchone()
            entry = db.execute(
                "INSERT INTO plug_ins (digest, returned, bundle, made_at, form, strength, checkpoint, tensors, staging)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    plug_in.digest,
                    manifest.returned,
                    manifest.bundle,
                    _now(),
                    manifest.form,
                    manifest.strength,
                    manifest.checkpoint,
                    tensors,
                    None if staging is None else str(staging.absolute()),
                ),
            ).lastrowid
            db.execute("UPDATE bundles SET state = 'plugged in' WHERE digest = ?", (manifest.bundle,))
        try:
            yield
        except BaseException:
            if not (plug_in.folder / MANIFEST).exists():
                with self._open() as db:
                    db.execute("DELETE FROM plug_ins WHERE id = ?", (entry,))
                    db.execute("UPDATE bundles SET state = ? WHERE digest = ?", (before, manifest.bundle))
            raise
        with self._open() as db:
            db.execute("UPDATE plug_ins SET staging = NULL WHERE id = ?", (entry,))

    def plugged_in(self, returned: Return, tensors: str | None = None) -> list[str]:
        """The times at which this return was plugged in, as ISO strings in UTC; empty if it never was.

        With the digest of its `tensors`, another return to the same bundle with the same tensors counts too.
        """
        with self._open() as db:
            return _made_at(db, returned.digest, returned.manifest.bundle, tensors)

    def accepted(self, returned: Return) -> bool:
        """Whether this return, identified by its digest, was ever accepted."""
        return any(state == "accepted" for state, _ in self.intakes(returned.digest))

    def intakes(self, digest: str) -> list[tuple[str, list[str]]]:
        """The results of all intakes of the return with this digest, in order.

        Each is "accepted" or "refused", with the reasons of the refusal.
        """
        with self._open() as db:
            rows = db.execute("SELECT state, reasons FROM returns WHERE digest = ? ORDER BY id", (digest,)).fetchall()
        return [(state, json.loads(reasons)) for state, reasons in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Context manager: open the database, with its tables, for one transaction."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # private: it names the kept blocks
            db = sqlite3.connect(self.path, timeout=LOCK_SECONDS)
            try:
                with db:  # one transaction: all of it, or nothing
                    db.executescript(_SCHEMA)
                    for table, added in _ADDED.items():
                        there = {column[1] for column in db.execute(f"PRAGMA table_info({table})")}
                        for name in added.keys() - there:
                            db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {added[name]}")
                    yield db
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"cannot use the ledger {self.path}: {error}",
                next_step="check that the home is writable and has space; nothing was recorded",
            ) from error


def _value(kind: type[V], text: str | None) -> V | None:
    """A value of a dataclass from the JSON object of its fields; None for None.

    Raises:
        ValueError: the JSON is malformed, or its keys are not the fields of the class `kind`.
    """
    if text is None:
        return None
    try:
        return kind(**json.loads(text))
    except TypeError as problem:
        raise ValueError(f"its {kind.__name__} is malformed: {problem}") from None


def _made_at(db: sqlite3.Connection, returned: str, bundle: str, tensors: str | None) -> list[str]:
    """The times at which a return was plugged in, as ISO strings in UTC; arguments are digests.

    A return to the same bundle with the same tensors counts as the same one, whatever its other bytes are.
    """
    rows = db.execute(
        "SELECT made_at FROM plug_ins WHERE returned = ? OR (bundle = ? AND tensors = ?) ORDER BY id",
        (returned, bundle, tensors),
    )
    return [made_at for (made_at,) in rows]


def returned_digest(returned: Return, checkpoint: int) -> str:
    """The SHA-256, in hex, over names, shapes and values of the tensors of one checkpoint of a return.

    It does not depend on how the files are written or signed. `checkpoint` counts from 1.
    """
    manifest, digest = returned.manifest, hashlib.sha256()
    last = checkpoint == manifest.checkpoints
    files = [WEIGHTS_OF[manifest.method] if last else checkpoint_file(checkpoint)]
    for file in [*files, *([CLASSIFIER] if manifest.classes else [])]:
        for name, tensor in sorted(returned.files.tensors(file).items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for part in tensor.raw():
                digest.update(part)
    return digest.hexdigest()


def plugged_in_before(times: Sequence[str]) -> PolicyError:
    """The error for a return that was already plugged in at these times."""
    return PolicyError(
        "this return was plugged in before",
        reasons=[f"plugged in at {', '.join(times)}"],
        next_step="if a second plug-in is meant, say so with --again",
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
