"""Verify a received folder: hashes, signatures and safetensors headers. No model is loaded or run.

The order is: verify, then parse, then load. Every rule is a function that yields its findings. The rules run in three
steps: signer and list of files, bytes, contents. All rules of a step run, so that one error lists every reason; the
first step with a finding is the last one. Torch-free.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from offsite.errors import IncompatibleError, OffsiteError, PolicyError, StorageError, UsageError, VerificationError
from offsite.protocol.artifacts import Bundle, PlugIn, Return, attest
from offsite.protocol.bundle_rules import BUNDLE_RULES
from offsite.protocol.contents import allowed_in_plug_in
from offsite.protocol.envelope_rules import FILE_RULES, LISTING_RULES, OWN_FAULT, SIGNER_RULES, digests, half_received
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
    render_manifest,
)
from offsite.protocol.return_rules import RETURN_RULES, beyond_policy
from offsite.protocol.signed_folder import Rule, SignedFolder
from offsite.storage.files import Written
from offsite.storage.regular_files import read_bounded
from offsite.storage.snapshot import SETTINGS_BYTES, ReadFile, Snapshot, holds_tensors, read_file, read_header_of

_SHOWN = 40  # most reasons that are listed, as a hostile folder can cause very many
_LONGEST = 500  # most characters of a reason
_UNEXPECTED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_DISTRUST = "do not use it; ask the sender for it again, and compare key fingerprints by another channel"


def verify(path: Path, home: Home, *, hold: bool = False) -> Bundle | Return | PlugIn:
    """Verify a bundle, a return (without the permissions of its bundle) or a plug-in.

    Args:
        path: the artifact's folder.
        home: this party's home, with its key and the keys that it trusts.
        hold: whether the hashed weights remain in memory for later use; this takes as many bytes as the files have.

    Raises:
        UsageError: the folder is not an artifact.
        VerificationError: verification fails; reasons list every failure.
    """
    manifest = read_unverified(path)
    if isinstance(manifest, BundleManifest):
        return verify_bundle(path, home, hold=hold)
    if isinstance(manifest, ReturnManifest):
        return verify_return(path, home, hold=hold)
    return verify_plug_in(path, home, hold=hold)


def verify_bundle(path: Path, home: Home, *, hold: bool = False) -> Bundle:
    """Verify a bundle that a trusted model owner addressed to this party, or that this party issued itself.

    Args:
        path: the bundle's folder.
        home: this party's home, with its key and the keys that it trusts.
        hold: whether the hashed weights remain in memory for a tuning that follows; this takes as many bytes as the
            files have. If not, the tuning reads and hashes them again.

    Raises:
        UsageError: the folder is not a bundle.
        VerificationError: verification fails; reasons list every failure.
    """
    signed = _open(path, home)
    if not isinstance(signed.manifest, BundleManifest):
        raise _wrong_kind(signed, "bundle")
    files = _run(signed, BUNDLE_RULES, hold=hold)
    return attest(path, signed.manifest, signed.digest, files)


def check_unsigned(folder: Path, manifest: BundleManifest, home: Home) -> None:
    """Run on a bundle's files, before it is signed, the rules that its recipient will run on them.

    Of files with tensors only the headers are read: this process hashed their bytes when it wrote them.

    Args:
        folder: the folder with all files that the manifest lists.
        manifest: the manifest that will be signed.
        home: the home of the party that will sign.

    Raises:
        IncompatibleError: a rule has findings; reasons list all of them.
    """
    signed = SignedFolder(folder, home, manifest, render_manifest(manifest))
    found = _findings(replace(signed, files=_read_written(signed)), (digests, *BUNDLE_RULES))
    if found:
        raise IncompatibleError(
            "its recipient would refuse it",
            reasons=[reason for reason, _ in found[:_SHOWN]],
            next_step="correct what is named in the base folder, or import the model again",
        )


def verify_return(path: Path, home: Home, bundle: BundleManifest | None = None, *, hold: bool = False) -> Return:
    """Verify a return that a trusted data owner addressed to this party, or that this party made itself.

    Args:
        path: the return's folder.
        home: this party's home, with its key and the keys that it trusts.
        bundle: the manifest of the bundle that the return answers, from the ledger; None: it is not known, and the
            bundle's permissions are not checked.
        hold: whether the hashed tensors remain in memory for later use; this takes as many bytes as the files have.

    Raises:
        UsageError: the folder is not a return.
        VerificationError: verification fails; reasons list every failure.
        PolicyError: the return is genuine, but uses a method, rank or width that the bundle does not permit.
    """
    signed = _open(path, home)
    if not isinstance(signed.manifest, ReturnManifest):
        raise _wrong_kind(signed, "return")
    policy = beyond_policy(signed.manifest, bundle) if bundle else []
    files = _run(signed, RETURN_RULES, parent=bundle, hold=hold, refusals=policy)
    if policy:
        raise PolicyError(
            "the return uses settings that the bundle does not permit",
            reasons=policy,
            next_step="ask for a return within it, or issue another bundle that permits more",
        )
    return attest(path, signed.manifest, signed.digest, files)


def verify_plug_in(path: Path, home: Home, *, hold: bool = False) -> PlugIn:
    """Verify that a plug-in was written by this party or a trusted one, and has not changed since.

    Args:
        path: the plug-in's folder.
        home: this party's home, with its key and the keys that it trusts.
        hold: whether the hashed weights remain in memory for later use; this takes as many bytes as the files have.

    Raises:
        UsageError: the folder is not a plug-in.
        VerificationError: verification fails; reasons list every failure.
    """
    signed = _open(path, home)
    if not isinstance(signed.manifest, PlugInManifest):
        raise _wrong_kind(signed, "plug-in")
    files = _run(signed, (_plug_in_files,), hold=hold)
    return attest(path, signed.manifest, signed.digest, files)


def _plug_in_files(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding for each listed file that a plug-in may not contain."""
    for entry in signed.manifest.files:
        if not allowed_in_plug_in(entry.name):
            yield f"a plug-in may not hold {entry.name}"


def read_unverified(path: Path) -> Manifest:
    """Parse the manifest of an artifact for display only: neither signature nor files are verified.

    Raises:
        UsageError: the folder is not an artifact.
        VerificationError: its manifest is malformed or not supported.
    """
    return _read_manifest(path)[0]


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """Parse a folder's manifest; return it with its bytes. Raises as `read_unverified`, or StorageError."""
    try:  # read once, so that the parsed bytes are those whose signature is checked
        raw = read_bounded(path / MANIFEST, MANIFEST_BYTES)
        return parse_manifest(raw), raw
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path} is not a bundle, return or plug-in",
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
    """Why a path without a manifest is not an artifact."""
    if path.is_dir():
        return f"it holds no {MANIFEST}"
    return "it is a file, and none of them is; an archive is unpacked first" if path.exists() else "it does not exist"


def _open(path: Path, home: Home) -> SignedFolder:
    """Read a folder's manifest for verification; its files are not read yet."""
    manifest, raw = _read_manifest(path)
    return SignedFolder(path, home, manifest, raw)


def _run(
    signed: SignedFolder,
    rules: tuple[Rule, ...],
    parent: BundleManifest | None = None,
    *,
    hold: bool = False,
    refusals: Sequence[str] = (),
) -> Snapshot:
    """Check signer and list of files, then bytes, then contents; the first of these steps that fails ends the check.

    So a stranger's files are not read, and files that are not those that were signed are not parsed.

    Args:
        signed: the folder; only its manifest has been read.
        rules: the rules for this kind of artifact.
        parent: the manifest of the bundle that a return answers, if known.
        hold: whether the weights remain in memory.
        refusals: reasons for which the party's policy refuses the artifact; if a rule has findings, the error lists
            these reasons after them.

    Returns:
        The files as they were read and hashed.

    Raises:
        VerificationError: a rule has findings; reasons list all of them.
    """
    _require_none(signed.folder, _findings(signed, (*SIGNER_RULES, *LISTING_RULES)))  # before any file is read
    files = _read_files(signed, hold=hold)
    subject = replace(signed, parent=parent, files=files)
    _require_none(signed.folder, _findings(subject, FILE_RULES))
    _require_none(signed.folder, _findings(subject, rules), refusals)
    listed = [Written(entry.name, entry.size, entry.sha256) for entry in signed.manifest.files]
    return Snapshot(signed.folder, listed, {name: file for name, file in files.items() if isinstance(file, ReadFile)})


def _require_none(folder: Path, found: Sequence[tuple[str, str]], refusals: Sequence[str] = ()) -> None:
    """Raise a VerificationError that lists the findings, then the refusals, if there is a finding.

    `found` has the text of each finding, and advice to the receiver.
    """
    if not found:
        return
    reasons = list(dict.fromkeys([*(reason for reason, _ in found), *refusals]))
    advice = list(dict.fromkeys(mends for _, mends in found if mends))
    own_fault = _DISTRUST not in advice and not refusals
    raise _failed(folder, reasons, "; ".join(advice) if own_fault else _DISTRUST)


def _read_written(signed: SignedFolder) -> dict[str, ReadFile | OffsiteError | OSError]:
    """As `_read_files`, for files that this process has just written: bytes of tensors are not read again."""
    found: dict[str, ReadFile | OffsiteError | OSError] = {}
    for entry in signed.manifest.files:
        file = signed.folder / entry.name
        try:
            tensors = holds_tensors(entry.name)
            found[entry.name] = read_header_of(file, entry.sha256) if tensors else read_file(file, hold=False)
        except (OffsiteError, OSError) as error:
            found[entry.name] = error
    return found


def _read_files(signed: SignedFolder, *, hold: bool) -> dict[str, ReadFile | OffsiteError | OSError]:
    """Read each listed file once; return, by file name, what was read, or the error if it cannot be read.

    `hold`: whether the weights remain in memory.
    """
    found: dict[str, ReadFile | OffsiteError | OSError] = {}
    room = SETTINGS_BYTES
    look_for_nan = isinstance(signed.manifest, ReturnManifest)
    for entry in signed.manifest.files:
        try:
            file = read_file(signed.folder / entry.name, entry.size, hold=hold, most=room, look_for_nan=look_for_nan)
        except (OffsiteError, OSError) as error:
            found[entry.name] = error
            continue
        found[entry.name] = file
        room -= len(file.content or b"")
    return found


def _findings(signed: SignedFolder, rules: Iterable[Rule]) -> list[tuple[str, str]]:
    """Run the rules; return a pair for each finding: its text, and advice to the receiver."""
    found: list[tuple[str, str]] = []
    for rule in rules:
        mends = None
        try:
            reasons = list(rule(signed))
            mends = OWN_FAULT[rule](signed) if reasons and rule in OWN_FAULT else None
        except OffsiteError as error:  # a broken file is a finding like any other
            reasons = [*(error.reasons or [error.what])]
            of_this_home = type(error) in (UsageError, OffsiteError)  # such as a missing key
            mends = error.next_step if of_this_home else None
        except OSError as error:
            reasons = [f"cannot read {str(error.filename)!r}: {error.strerror}"]
            mends = None
        except _UNEXPECTED as error:  # by content that a rule did not expect, which is refused like any other
            reasons = [f"{rule.__name__.strip('_')} cannot be checked: {type(error).__name__}: {str(error)[:200]}"]
            mends = None
        found += [(reason, mends or _DISTRUST) for reason in reasons]
    return _without_half_received(signed, found)


def _without_half_received(signed: SignedFolder, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remove the advice to distrust the sender from findings about files whose transfer has not ended.

    `found` are pairs of finding and advice. If every advice is to distrust the sender, they are returned unchanged.
    """
    if not any(rule_advice != _DISTRUST for _, rule_advice in found) or not signed.folder.is_dir():
        return found
    missing = {f"{name} is missing" for name in half_received(signed)}
    return [(reason, "" if reason in missing else mends) for reason, mends in found]


def _failed(folder: Path, reasons: list[str], next_step: str = _DISTRUST) -> VerificationError:
    """The error for a folder that fails verification; long texts and long lists of reasons are cut.

    `next_step` is the advice to the receiver; by default, not to use the folder.
    """
    more = [f"and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
    cut = [reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..." for reason in reasons[:_SHOWN]]
    return VerificationError(
        f"{folder} fails verification",
        reasons=[*cut, *more],
        next_step=next_step,
    )


def _wrong_kind(signed: SignedFolder, expected: str) -> UsageError:
    """The error for an artifact of another kind than `expected`."""
    return UsageError(
        f"{signed.folder} is a {signed.manifest.kind}, expected a {expected}",
        next_step=f"name the {expected}'s folder",
    )
