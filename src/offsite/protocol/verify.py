"""Verifying what a stranger sent: hashes, signatures and safetensors headers, and nothing that runs a model.

Verify, then parse, then load. Every rule is a function that lists what it found wrong; all rules run, so that one look
shows every reason. Torch-free.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from offsite.errors import OffsiteError, PolicyError, StorageError, UsageError, VerificationError
from offsite.protocol.artifacts import Bundle, PlugIn, Return, attest
from offsite.protocol.bundle_rules import BUNDLE_RULES
from offsite.protocol.contents import allowed_in_plug_in
from offsite.protocol.envelope_rules import ENVELOPE_RULES, OWN_FAULT
from offsite.protocol.home import Home
from offsite.protocol.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    BundleManifest,
    Manifest,
    ManifestProblem,
    PlugInManifest,
    ReturnManifest,
    parse_manifest,
)
from offsite.protocol.return_rules import RETURN_RULES, beyond_policy
from offsite.protocol.signed_folder import Rule, Sealed, plain_file, read_bounded

_SHOWN = 40  # reasons that are listed; who sends more is not worth more of the screen
_LONGEST = 500  # characters of one
_DISTRUST = "do not use it; ask the sender for it again, and compare key fingerprints by another channel"


def verify(path: Path, home: Home) -> Bundle | Return | PlugIn:
    """Verify an artifact of any kind.

    Raises:
        UsageError: the folder is no artifact.
        VerificationError: it fails; reasons list every failure.
    """
    manifest = read_unverified(path)
    if isinstance(manifest, BundleManifest):
        return verify_bundle(path, home)
    if isinstance(manifest, ReturnManifest):
        return verify_return(path, home)
    return verify_plug_in(path, home)


def verify_bundle(path: Path, home: Home) -> Bundle:
    """Verify a bundle that a trusted owner addressed to this party (or one that this party issued).

    Raises:
        UsageError: the folder is no bundle.
        VerificationError: it fails; reasons list every failure.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, BundleManifest):
        raise _wrong_kind(sealed, "bundle")
    _run(sealed, (*ENVELOPE_RULES, *BUNDLE_RULES))
    return attest(path, sealed.manifest, sealed.digest)


def verify_return(path: Path, home: Home, bundle: BundleManifest | None = None) -> Return:
    """Verify a return that a trusted data owner addressed to this party (or one that this party made).

    Args:
        path: the return's folder.
        home: whose trusted keys count.
        bundle: the manifest of the bundle that it answers, from the ledger; without it, what that bundle permits
            cannot be checked.

    Raises:
        UsageError: the folder is no return.
        VerificationError: it fails; reasons list every failure.
        PolicyError: it is genuine, but uses a method or rank that the bundle does not permit.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, ReturnManifest):
        raise _wrong_kind(sealed, "return")
    policy = beyond_policy(sealed.manifest, bundle) if bundle else []
    _run(sealed, (*ENVELOPE_RULES, *RETURN_RULES), parent=bundle, beside=policy)
    if policy:
        raise PolicyError(
            "the return goes beyond what the bundle permits",
            reasons=policy,
            next_step="ask for a return within it, or issue another bundle that permits more",
        )
    return attest(path, sealed.manifest, sealed.digest)


def verify_plug_in(path: Path, home: Home) -> PlugIn:
    """Verify that a plug-in is as this party, or one that it trusts, wrote it.

    Raises:
        UsageError: the folder is no plug-in.
        VerificationError: it fails; reasons list every failure.
    """
    sealed = _open(path, home)
    if not isinstance(sealed.manifest, PlugInManifest):
        raise _wrong_kind(sealed, "plug-in")
    _run(sealed, (*ENVELOPE_RULES, _plug_in_files))
    return attest(path, sealed.manifest, sealed.digest)


def _plug_in_files(sealed: Sealed) -> Iterator[str]:
    for entry in sealed.manifest.files:
        if not allowed_in_plug_in(entry.name):
            yield f"a plug-in may not hold {entry.name}"


def read_unverified(path: Path) -> Manifest:
    """The manifest of an artifact, to look at only: nothing has been verified.

    Raises:
        UsageError: the folder is no artifact.
        VerificationError: its manifest cannot be read.
    """
    return _read_manifest(path)[0]


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    try:  # read once: what is parsed are the bytes whose signature is checked
        raw = read_bounded(plain_file(path, MANIFEST), MANIFEST_BYTES)
        return parse_manifest(raw), raw
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path} is no bundle, return or plug-in",
            reasons=[_why_not(path)],
            next_step="name the folder that was received, whole",
        ) from None
    except ManifestProblem as problem:
        raise _failed(path, problem.reasons) from None
    except OSError as error:
        raise StorageError(
            f"cannot read {path / MANIFEST}: {error.strerror}", next_step="check the folder's permissions and its disk"
        ) from error


def _why_not(path: Path) -> str:
    if path.is_dir():
        return f"it holds no {MANIFEST}"
    return "it is a file, and none of them is; an archive is unpacked first" if path.exists() else "it does not exist"


def _open(path: Path, home: Home) -> Sealed:
    manifest, raw = _read_manifest(path)
    return Sealed(path, home, manifest, raw)


def _run(
    sealed: Sealed,
    rules: tuple[Rule, ...],
    parent: BundleManifest | None = None,
    beside: Sequence[str] = (),
) -> None:
    subject = replace(sealed, parent=parent)
    reasons: list[str] = []
    advice: list[str] = []
    for rule in rules:
        mends = OWN_FAULT.get(rule)
        try:
            found = list(rule(subject))
        except OffsiteError as error:  # a broken file is a finding like any other
            found = [*(error.reasons or [error.what])]
            mends = error.next_step if isinstance(error, UsageError) else None  # this home's own, as a missing key
        except OSError as error:
            found = [f"cannot read {str(error.filename)!r}: {error.strerror}"]
            mends = None
        reasons += found
        advice += [mends or _DISTRUST] if found else []
    if reasons:
        mended = _DISTRUST not in advice and not beside
        next_step = "; ".join(dict.fromkeys(advice)) if mended else _DISTRUST
        raise _failed(sealed.folder, list(dict.fromkeys([*reasons, *beside])), next_step)


def _failed(folder: Path, reasons: list[str], next_step: str = _DISTRUST) -> VerificationError:
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    cut = [reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..." for reason in reasons[:_SHOWN]]
    return VerificationError(
        f"{folder} fails verification",
        reasons=[*cut, *more],
        next_step=next_step,
    )


def _wrong_kind(sealed: Sealed, expected: str) -> UsageError:
    return UsageError(
        f"{sealed.folder} is a {sealed.manifest.kind}, expected a {expected}",
        next_step=f"name the {expected}'s folder",
    )
