"""Intake: a return is checked against the ledger, and what became of it is written down."""

import hashlib
from pathlib import Path

from offsite.errors import PolicyError, UsageError, VerificationError
from offsite.model_owner.ledger import Issued, Ledger
from offsite.protocol.artifacts import Return
from offsite.protocol.home import Home
from offsite.protocol.manifest import MANIFEST, MANIFEST_BYTES, ReturnManifest
from offsite.protocol.verify import read_unverified, verify_return
from offsite.storage.regular_files import read_bounded

_NEVER_ISSUED = "it answers a bundle that this home's ledger never issued"
_WHICH_HOME = "name the --home that issued the bundle; if it is the right one, refuse the return"


def intake(path: Path, home: Home) -> Return:
    """Verify a return against the bundle that it answers, and record whether it was accepted or refused, and why.

    Returns:
        The verified return, which `plug_in` takes; its tensors are in memory, as many bytes as its files have.

    Raises:
        VerificationError: changed, foreign, or not what the bundle permits in names, shapes, dtypes or values.
        PolicyError: a method or rank that the bundle does not permit.
    """
    ledger = Ledger(home.ledger)
    try:
        returned = check_return(path, home, hold=True)
    except (VerificationError, PolicyError) as error:
        ledger.record_intake(_digest(path), _claimed_bundle(path, ledger), error.reasons or (error.what,))
        raise
    ledger.record_intake(returned.digest, returned.manifest.bundle)
    return returned


def require_taken_in(returned: Return, home: Home) -> None:
    """Refuse a return that was only looked at, or verified in another home.

    Raises:
        UsageError: the ledger has no entry that it was verified against its bundle and accepted.
    """
    if not Ledger(home.ledger).accepted(returned):
        raise UsageError(
            f"{returned.folder} was not taken in by this home",
            reasons=["its ledger has no entry that the return was verified against its bundle and accepted"],
            next_step="take it in first, with `offsite.intake(folder, home)`",
        )


def issued_bundle(returned: Return, home: Home) -> Issued:
    """The bundle that a return answers, as the ledger knows it.

    Raises:
        VerificationError: this home never issued it.
    """
    issued = Ledger(home.ledger).issued(returned.manifest.bundle)
    if issued is None:
        raise VerificationError(f"{returned.folder} fails verification", reasons=[_NEVER_ISSUED], next_step=_WHICH_HOME)
    return issued


def check_return(path: Path, home: Home, *, hold: bool = False) -> Return:
    """Verify a return against the bundle that it answers, and record nothing.

    Raises:
        VerificationError: as `intake`.
        PolicyError: as `intake`.
    """
    claimed = read_unverified(path)
    parent = Ledger(home.ledger).issued(claimed.bundle) if isinstance(claimed, ReturnManifest) else None
    if parent is not None:
        return verify_return(path, home, parent.manifest, hold=hold)
    reasons = [_NEVER_ISSUED]
    try:
        verify_return(path, home)
    except VerificationError as error:
        reasons += error.reasons
    raise VerificationError(f"{path} fails verification", reasons=reasons, next_step=_WHICH_HOME)


def _claimed_bundle(path: Path, ledger: Ledger) -> str | None:
    """The bundle that a refused return names, if this party issued it."""
    try:
        claimed = read_unverified(path)
    except VerificationError:
        return None
    issued = ledger.issued(claimed.bundle) if isinstance(claimed, ReturnManifest) else None
    return issued.digest if issued else None


def _digest(path: Path) -> str:
    """SHA-256 of the manifest; nothing if there is none that may be opened."""
    try:
        raw = read_bounded(path / MANIFEST, MANIFEST_BYTES)
    except (VerificationError, OSError):
        return ""
    return hashlib.sha256(raw).hexdigest()
