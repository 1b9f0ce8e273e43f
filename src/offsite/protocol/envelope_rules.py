"""Rules for every artifact: who signed it, for whom, and that its files are exactly those that were signed."""

import stat
from collections.abc import Iterator, Mapping

from offsite.protocol.manifest import (
    MANIFEST,
    SIGNATURE,
    PlugInManifest,
)
from offsite.protocol.signed_folder import Rule, Sealed, is_plain, read_bounded
from offsite.protocol.signing import SIGNATURE_BYTES, PublicKey
from offsite.storage.files import sha256_of


def _signature(sealed: Sealed) -> Iterator[str]:
    file = sealed.folder / SIGNATURE
    signature = read_bounded(file, SIGNATURE_BYTES) if is_plain(file) else b""
    if not PublicKey.from_hex(sealed.signer).verifies(signature, sealed.manifest.kind, sealed.raw):
        yield f"the signature in {SIGNATURE} is not the signer's over these bytes of {MANIFEST}"


def _trusted_signer(sealed: Sealed) -> Iterator[str]:
    keys = {key.hex for key in sealed.home.trusted().values()} | {sealed.home.identity().public_key.hex}
    if sealed.signer not in keys:
        fingerprint = PublicKey.from_hex(sealed.signer).fingerprint
        yield f"signed by {fingerprint}, not trusted here (`offsite trust add NAME FILE.pub`, after checking it)"


def _addressee(sealed: Sealed) -> Iterator[str]:
    own = sealed.home.identity().public_key.hex
    if isinstance(sealed.manifest, PlugInManifest) or own in (sealed.manifest.recipient, sealed.signer):
        return
    found = PublicKey.from_hex(sealed.manifest.recipient).fingerprint
    yield f"addressed to {found}, this party is {PublicKey.from_hex(own).fingerprint}"


def _listing(sealed: Sealed) -> Iterator[str]:
    listed = {entry.name for entry in sealed.manifest.files} | {MANIFEST, SIGNATURE}
    found = set()
    for path in sorted(sealed.folder.iterdir()):
        found.add(path.name)
        if not stat.S_ISREG(path.lstat().st_mode):
            yield f"{path.name!r} is no plain file"
        elif path.name not in listed:
            yield f"{path.name!r} is not listed in {MANIFEST}"
    for name in sorted(listed - found):
        yield f"{name} is missing"


def _digests(sealed: Sealed) -> Iterator[str]:
    for entry in sealed.manifest.files:
        path = sealed.folder / entry.name
        if not is_plain(path):
            continue  # _listing says so
        if path.stat().st_size != entry.size:
            yield f"{entry.name} has {path.stat().st_size} bytes, expected {entry.size}"
        elif sha256_of(path) != entry.sha256:
            yield f"the bytes of {entry.name} are not those that were signed"


# What mends a finding on the receiver's side; any other one is the sender's.
OWN_FAULT: Mapping[Rule, str] = {
    _trusted_signer: "compare the key's fingerprint with the sender over another channel, then "
    "`offsite trust add NAME FILE.pub`",
    _addressee: "name the right --home; if it is, send your present public key (`offsite keygen --out FILE.pub`) "
    "and ask for one that is addressed to it",
}
ENVELOPE_RULES: tuple[Rule, ...] = (_signature, _trusted_signer, _addressee, _listing, _digests)
