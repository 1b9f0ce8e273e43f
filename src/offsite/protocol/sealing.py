"""Sealing: the manifest and its signature, written last into a folder that is not yet visible."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from offsite.protocol.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest, parse_manifest, render_manifest
from offsite.protocol.signing import Identity
from offsite.storage.files import Written, write_stream


def file_entries(written: Iterable[Written]) -> tuple[FileEntry, ...]:
    """Manifest entries of files just written, sorted by name."""
    return tuple(
        FileEntry(name=file.name, size=file.size, sha256=file.sha256)
        for file in sorted(written, key=lambda file: file.name)
    )


def seal(folder: Path, manifest: Manifest, identity: Identity) -> str:
    """Write `offsite.json` and its signature into a staged folder.

    Returns:
        The artifact's digest: SHA-256 of the manifest's bytes.
    """
    raw = render_manifest(manifest)
    parse_manifest(raw)  # what the other party would refuse must not leave the house
    write_stream(folder / MANIFEST, [raw])
    write_stream(folder / SIGNATURE, [identity.sign(manifest.kind, raw)])
    return hashlib.sha256(raw).hexdigest()
