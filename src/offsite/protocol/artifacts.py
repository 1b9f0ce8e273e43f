"""The artifacts as frozen values. Every `Bundle`, `Return` or `PlugIn` object was verified, or sealed by this process.

Only `offsite.protocol.verify` and `offsite.protocol.sealing` construct them, with `attest`; for other callers their
constructors raise TypeError.
"""

from collections.abc import Hashable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import overload

from offsite.protocol.manifest import BundleManifest, Manifest, PlugInManifest, ReturnManifest
from offsite.storage.snapshot import Snapshot

_PROOF = object()  # the constructors of artifacts require it, and only `attest` passes it


@dataclass(frozen=True)
class Base:
    """The folder of a base checkpoint: ordinary Hugging Face files, with weights in safetensors only."""

    folder: Path
    # fingerprints computed earlier; the key holds the state of the files, so that a changed file is hashed again
    fingerprints: dict[Hashable, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # callers may pass a string


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `digest` is the SHA-256 of its manifest's bytes; returns and plug-ins name the bundle by it.

    Raises:
        TypeError: the constructor was called directly; use `verify_bundle` or `pack`.
    """

    folder: Path
    manifest: BundleManifest
    digest: str
    files: Snapshot = field(repr=False, compare=False)  # what was hashed
    proof: InitVar[object] = None

    def __post_init__(self, proof: object) -> None:
        _require_proof(proof, "a Bundle comes from verify_bundle() or pack()")


@dataclass(frozen=True)
class Return:
    """A verified return. `digest` is the SHA-256 of its manifest's bytes.

    Raises:
        TypeError: the constructor was called directly; use `intake`, `verify_return` or `tune`.
    """

    folder: Path
    manifest: ReturnManifest
    digest: str
    files: Snapshot = field(repr=False, compare=False)  # what was hashed
    proof: InitVar[object] = None

    def __post_init__(self, proof: object) -> None:
        _require_proof(proof, "a Return comes from intake(), verify_return() or tune()")


@dataclass(frozen=True)
class PlugIn:
    """A verified plug-in: an adapter folder for the base, or a complete checkpoint.

    Raises:
        TypeError: the constructor was called directly; use `verify_plug_in` or `plug_in`.
    """

    folder: Path
    manifest: PlugInManifest
    digest: str
    files: Snapshot = field(repr=False, compare=False)  # what was hashed
    proof: InitVar[object] = None

    def __post_init__(self, proof: object) -> None:
        _require_proof(proof, "a PlugIn comes from verify_plug_in() or plug_in()")


def files_of(artifact: Path | Base | Bundle | Return | PlugIn) -> Path | Snapshot:
    """The verified snapshot of an artifact's files; for a `Path` or a `Base`, which are not verified, the folder."""
    if isinstance(artifact, Path):
        return artifact
    return artifact.folder if isinstance(artifact, Base) else artifact.files


def _require_proof(proof: object, origin: str) -> None:
    """Raise TypeError unless `proof` is the object that only `attest` passes to constructors.

    `origin` is the start of the message: which functions make such an artifact.
    """
    if proof is not _PROOF:
        raise TypeError(f"{origin}; it is never constructed by hand")


@overload
def attest(folder: Path, manifest: BundleManifest, digest: str, files: Snapshot) -> Bundle: ...
@overload
def attest(folder: Path, manifest: ReturnManifest, digest: str, files: Snapshot) -> Return: ...
@overload
def attest(folder: Path, manifest: PlugInManifest, digest: str, files: Snapshot) -> PlugIn: ...
def attest(folder: Path, manifest: Manifest, digest: str, files: Snapshot) -> Bundle | Return | PlugIn:
    """Construct the artifact for a folder that the caller verified or sealed. Only `verify` and `sealing` call this.

    Args:
        folder: the artifact's folder.
        manifest: the parsed content of its `offsite.json`.
        digest: SHA-256 of the manifest's bytes, in hex.
        files: the files that the manifest lists.
    """
    if isinstance(manifest, BundleManifest):
        return Bundle(folder, manifest, digest, files, _PROOF)
    if isinstance(manifest, ReturnManifest):
        return Return(folder, manifest, digest, files, _PROOF)
    return PlugIn(folder, manifest, digest, files, _PROOF)
