"""Intake: verifies a return against its bundle, and records in the ledger whether it was accepted or refused."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from offsite.errors import PolicyError, UsageError, VerificationError
from offsite.model_owner.ledger import Issued, Ledger
from offsite.protocol.artifacts import Return
from offsite.protocol.home import Home
from offsite.protocol.manifest import MANIFEST, MANIFEST_BYTES, ReturnManifest
from offsite.protocol.verify import read_unverified, verify_return
from offsite.storage.regular_files import read_bounded

_NEVER_ISSUED = "it answers a bundle that this home's ledger never issued"


def intake(path: Path, home: Home) -> Return:
    """Verify a return against its bundle, and record in the ledger whether it was accepted or refused, and why.

    Args:
        path: the return's folder.
        home: the model owner's home folder, with its ledger and the data owner's trusted key.

    Returns:
        The verified return, for `plug_in`. Its tensors are in memory and need as many bytes as its files.

    Raises:
        VerificationError: the return was changed, is not from the bundle's recipient, or has tensor names, shapes,
            dtypes or values that the bundle does not permit.
        PolicyError: the bundle does not permit the return's method or rank.
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
    """Raise an error unless this home's ledger records that the return was verified and accepted.

    Raises:
        UsageError: the ledger has no such record, for example because the return was verified in another home.
    """
    if not Ledger(home.ledger).accepted(returned):
        raise UsageError(
            f"{returned.folder} was not taken in by this home",
            reasons=["its ledger has no entry that the return was verified against its bundle and accepted"],
            next_step="take it in first, with `offsite.intake(folder, home)`",
        )


def issued_bundle(returned: Return, home: Home) -> Issued:
    """The ledger's record of the bundle that a return belongs to.

    Raises:
        VerificationError: this home never issued the bundle.
    """
    issued = Ledger(home.ledger).issued(returned.manifest.bundle)
    if issued is None:
        raise _of_another_home(returned.folder, [_NEVER_ISSUED])
    return issued


def check_return(path: Path, home: Home, *, hold: bool = False) -> Return:
    """Verify a return against its bundle without recording anything in the ledger.

    Args:
        path: the return's folder.
        home: the model owner's home folder.
        hold: whether to keep the verified tensors in memory, as `plug_in` needs them.

    Raises:
        VerificationError: as for `intake`.
        PolicyError: as for `intake`.
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
    raise _of_another_home(path, reasons)


def _of_another_home(path: Path, reasons: Sequence[str]) -> VerificationError:
    return VerificationError(
        f"{path} fails verification",
        reasons=reasons,
        next_step="name the --home that issued the bundle; if it is the right one, refuse the return",
    )


def _claimed_bundle(path: Path, ledger: Ledger) -> str | None:
    """The digest of the bundle that a refused return says it belongs to; None if this home never issued that bundle."""
    try:
        claimed = read_unverified(path)
    except VerificationError:
        return None
    issued = ledger.issued(claimed.bundle) if isinstance(claimed, ReturnManifest) else None
    return issued.digest if issued else None


def _digest(path: Path) -> str:
    """SHA-256 of the return's manifest in hex; an empty string if the manifest cannot be read."""
    try:
        raw = read_bounded(path / MANIFEST, MANIFEST_BYTES)
    except (VerificationError, OSError):
        return ""
    return hashlib.sha256(raw).hexdigest()
