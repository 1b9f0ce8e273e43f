"""Rules for every artifact: the signer is trusted, this party is the recipient, and the files are the signed ones."""

import stat
from collections.abc import Callable, Iterator, Mapping

from offsite.errors import VerificationError
from offsite.protocol.manifest import (
    MANIFEST,
    SIGNATURE,
    PlugInManifest,
)
from offsite.protocol.signed_folder import Rule, SignedFolder
from offsite.protocol.signing import SIGNATURE_BYTES, PublicKey
from offsite.storage.leftovers import delete_command, is_leftover, unfinished
from offsite.storage.regular_files import read_bounded
from offsite.storage.snapshot import ReadFile

_DELETED = 20  # files that a command to delete them names at once


def _signature(signed: SignedFolder) -> Iterator[str]:
    """Check that the signature is the signer's over the bytes of the manifest."""
    file = signed.folder / SIGNATURE
    try:
        signature = read_bounded(file, SIGNATURE_BYTES)
    except (VerificationError, FileNotFoundError):
        signature = b""  # `_listing` reports the missing or irregular file
    if not PublicKey.from_hex(signed.signer).verifies(signature, signed.manifest.kind, signed.raw):
        yield f"the signature in {SIGNATURE} is not the signer's over these bytes of {MANIFEST}"


def _trusted_signer(signed: SignedFolder) -> Iterator[str]:
    """Check that the signer is this party or one that it trusts."""
    keys = {key.hex for key in signed.home.trusted().values()} | {signed.home.identity().public_key.hex}
    if signed.signer not in keys:
        fingerprint = PublicKey.from_hex(signed.signer).fingerprint
        yield f"signed by {fingerprint}, not trusted here (`offsite trust add NAME FILE.pub`, after checking it)"


def _signer_role(signed: SignedFolder) -> Iterator[str]:
    """Check that the signer's role, if it has one here, fits what it signed; a plug-in needs a model owner's key."""
    roles, kind = signed.home.roles(), signed.manifest.kind
    if signed.signer == signed.home.identity().public_key.hex or signed.signer not in roles:
        return  # `_trusted_signer` reports an unknown key
    role, needed = roles[signed.signer], "data-owner" if kind == "return" else "model-owner"
    if role != needed and (role is not None or kind == "plug-in"):
        found = f"a {role}" if role else "no role"
        yield f"a {kind} is signed by a {needed}, and this key is trusted as {found}"


def _addressee(signed: SignedFolder) -> Iterator[str]:
    """Check that this party is the recipient or the signer; a plug-in has no recipient."""
    own = signed.home.identity().public_key.hex
    if isinstance(signed.manifest, PlugInManifest) or own in (signed.manifest.recipient, signed.signer):
        return
    found = PublicKey.from_hex(signed.manifest.recipient).fingerprint
    yield f"addressed to {found}, this party is {PublicKey.from_hex(own).fingerprint}"


def _listed(signed: SignedFolder) -> set[str]:
    """The names of all files that the folder must contain: listed files, manifest and signature."""
    return {entry.name for entry in signed.manifest.files} | {MANIFEST, SIGNATURE}


def _listing(signed: SignedFolder) -> Iterator[str]:
    """Check that the folder contains all these files, as regular files, and no others."""
    listed = _listed(signed)
    found = set()
    for path in sorted(signed.folder.iterdir()):
        found.add(path.name)
        if is_leftover(path.name, listed):
            continue  # `_leftovers` reports it
        if not stat.S_ISREG(path.lstat().st_mode):
            yield f"{path.name!r} is not a plain file"
        elif path.name not in listed:
            yield f"{path.name!r} is not listed in {MANIFEST}"
    for name in sorted(listed - found):
        yield f"{name} is missing"


def _leftovers(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding for each leftover file, such as .DS_Store: a signed folder contains only the signed files."""
    listed = _listed(signed)
    for path in sorted(signed.folder.iterdir()):
        if is_leftover(path.name, listed):
            by = "a transfer that has not ended" if unfinished(path.name, listed) else "a program on the way"
            yield f"{path.name!r} is not listed in {MANIFEST}; by its name {by} left it"


def _leftover_advice(signed: SignedFolder) -> str:
    """What to do about leftover files: wait for the end of a transfer, or delete them."""
    if halves := half_received(signed):
        return f"wait until {', '.join(sorted(halves))} has arrived, or fetch the folder again; then verify it again"
    listed = _listed(signed)
    left = [path for path in sorted(signed.folder.iterdir()) if is_leftover(path.name, listed)]
    return f"delete these files, which are no part of it, and verify again: {delete_command(left[:_DELETED])}"


def half_received(signed: SignedFolder) -> set[str]:
    """The names of listed files that are missing, but of which the folder has a partly transferred copy."""
    listed, found = _listed(signed), {path.name for path in signed.folder.iterdir()}
    return {whole for name in found if (whole := unfinished(name, listed)) and whole not in found}


def digests(signed: SignedFolder) -> Iterator[str]:
    """Yield a finding for each file whose size or bytes differ from those in the manifest, or that cannot be read."""
    for entry in signed.manifest.files:
        found = signed.files.get(entry.name)
        if isinstance(found, ReadFile):  # else `_listing` reports the missing or irregular file
            if found.size != entry.size:
                yield f"{entry.name} has {found.size} bytes, expected {entry.size}"
            elif found.problem:  # not hashed
                yield from found.problem.reasons or (found.problem.what,)
            elif found.sha256 is None:
                yield f"{entry.name} is too large with {found.size} bytes, or changed while it was read"
            elif found.sha256 != entry.sha256:
                yield f"the bytes of {entry.name} are not those that were signed"
        elif isinstance(found, OSError) and not isinstance(found, FileNotFoundError):
            yield f"cannot read {entry.name}: {found.strerror}"


# By rule, advice on findings that the receiver can correct; only the sender can correct findings of other rules.
OWN_FAULT: Mapping[Rule, Callable[[SignedFolder], str]] = {
    _trusted_signer: lambda _: (
        "compare the key's fingerprint with the sender over another channel, then `offsite trust add NAME FILE.pub`"
    ),
    _signer_role: lambda signed: (
        "if that party is meant to sign it, `offsite trust add NAME FILE.pub --role "
        f"{'data-owner' if signed.manifest.kind == 'return' else 'model-owner'}`; if not, refuse it"
    ),
    _addressee: lambda _: (
        "name the right --home; if it is, send your present public key (`offsite keygen --out FILE.pub`) "
        "and ask for one that is addressed to it"
    ),
    _leftovers: _leftover_advice,
}
SIGNER_RULES: tuple[Rule, ...] = (_signature, _trusted_signer, _signer_role, _addressee)
LISTING_RULES: tuple[Rule, ...] = (_listing, _leftovers)
FILE_RULES: tuple[Rule, ...] = (digests,)
