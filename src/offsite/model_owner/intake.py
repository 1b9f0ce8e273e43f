"""Intake: a return is checked against the ledger, and what became of it is written down."""

import hashlib
from pathlib import Path

from offsite.core.storage import storage_errors
from offsite.errors import PolicyError, VerificationError
from offsite.exchange.artifacts import Return
from offsite.exchange.home import Home
from offsite.exchange.manifest import MANIFEST, MANIFEST_BYTES, ReturnManifest
from offsite.exchange.verify import read_unverified, verify_return
from offsite.model_owner.ledger import Issued, Ledger


def intake(path: Path, home: Home) -> tuple[Return, Issued]:
    """Verify a return against the bundle that it answers, and record whether it was accepted or refused, and why.

    Returns:
        The verified return, and the bundle as the ledger knows it.

    Raises:
        VerificationError: changed, foreign, or not what the bundle permits in names, shapes, dtypes or values.
        PolicyError: a method or rank that the bundle does not permit.
    """
    ledger = Ledger(home.ledger)
    parent: Issued | None = None
    try:
        claimed = read_unverified(path)
        if isinstance(claimed, ReturnManifest):
            parent = ledger.issued(claimed.bundle)
        returned = _verified(path, home, parent)
    except (VerificationError, PolicyError) as error:
        ledger.record_intake(_digest(path), parent.digest if parent else None, error.reasons or (error.what,))
        raise
    if parent is None:
        raise AssertionError("a return without a known parent passed verification")
    ledger.record_intake(returned.digest, parent.digest)
    return returned, parent


def _verified(path: Path, home: Home, parent: Issued | None) -> Return:
    if parent is not None:
        return verify_return(path, home, parent.manifest)
    reasons = ["it answers a bundle that this home's ledger never issued"]
    try:
        verify_return(path, home)
    except VerificationError as error:
        reasons += error.reasons
    raise VerificationError(
        f"{path} fails verification",
        reasons=reasons,
        next_step="name the --home that issued the bundle; if it is the right one, refuse the return",
    )


def _digest(path: Path) -> str:
    with storage_errors(path), (path / MANIFEST).open("rb") as stream:
        return hashlib.sha256(stream.read(MANIFEST_BYTES + 1)).hexdigest()
