"""Seals a new artifact: writes its manifest and signature as the last files, before the folder gets its final name."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import overload

from offsite.protocol.artifacts import Bundle, PlugIn, Return, attest
from offsite.protocol.manifest import (
    MANIFEST,
    SIGNATURE,
    BundleManifest,
    FileEntry,
    Manifest,
    PlugInManifest,
    ReturnManifest,
    parse_manifest,
    render_manifest,
)
from offsite.protocol.signing import Identity
from offsite.storage.files import Written, write_stream
from offsite.storage.snapshot import Snapshot


def file_entries(written: Iterable[Written]) -> tuple[FileEntry, ...]:
    """The entries for a manifest of files that were just written, sorted by file name."""
    return tuple(
        FileEntry(name=file.name, size=file.size, sha256=file.sha256)
        for file in sorted(written, key=lambda file: file.name)
    )


@overload
def seal(folder: Path, manifest: BundleManifest, identity: Identity, out: Path) -> Bundle: ...
@overload
def seal(folder: Path, manifest: ReturnManifest, identity: Identity, out: Path) -> Return: ...
@overload
def seal(folder: Path, manifest: PlugInManifest, identity: Identity, out: Path) -> PlugIn: ...
def seal(folder: Path, manifest: Manifest, identity: Identity, out: Path) -> Bundle | Return | PlugIn:
    """Write `offsite.json` and its signature into a temporary folder, which the caller then renames to `out`.

    Args:
        folder: the temporary folder (see `staged_folder`), with all files that the manifest lists.
        manifest: the artifact's manifest.
        identity: the party that signs.
        out: the final path of the folder.

    Returns:
        The artifact at `out`; it needs no verification, because this process has written it.
    """
    raw = render_manifest(manifest)
    parse_manifest(raw)  # a manifest that the other party would refuse must not be sent
    write_stream(folder / MANIFEST, [raw])
    write_stream(folder / SIGNATURE, [identity.sign(manifest.kind, raw)])
    files = Snapshot(out, [Written(entry.name, entry.size, entry.sha256) for entry in manifest.files])
    return attest(out, manifest, hashlib.sha256(raw).hexdigest(), files)
