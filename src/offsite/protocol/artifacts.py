"""The frozen values that pass between stages. A Bundle, Return or PlugIn in hand has been verified, or sealed just now.

Their constructors refuse everybody but `offsite.protocol.verify` and `offsite.protocol.sealing`, which use `attest`.
"""

from collections.abc import Hashable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import overload

from offsite.protocol.manifest import BundleManifest, Manifest, PlugInManifest, ReturnManifest
from offsite.storage.snapshot import Snapshot

_PROOF = object()  # who constructs an artifact holds it


@dataclass(frozen=True)
class Base:
    """A base checkpoint folder: ordinary Hugging Face files, safetensors only."""

    folder: Path
    # fingerprints that were computed before, each by the key and the states of the files that it holds for
    fingerprints: dict[Hashable, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # may have come as text


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `digest` is the SHA-256 of its manifest's bytes and names it in the chain.

    Raises:
        TypeError: it is constructed by hand; `verify_bundle` and `pack` are where bundles come from.
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
    """A verified return; `digest` is the SHA-256 of its manifest's bytes.

    Raises:
        TypeError: it is constructed by hand; `intake`, `verify_return` and `tune` are where returns come from.
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
        TypeError: it is constructed by hand; `verify_plug_in` and `plug_in` are where plug-ins come from.
    """

    folder: Path
    manifest: PlugInManifest
    digest: str
    files: Snapshot = field(repr=False, compare=False)  # what was hashed
    proof: InitVar[object] = None

    def __post_init__(self, proof: object) -> None:
        _require_proof(proof, "a PlugIn comes from verify_plug_in() or plug_in()")


def files_of(artifact: Path | Base | Bundle | Return | PlugIn) -> Path | Snapshot:
    """Where the files of an artifact are taken from: the ones that were verified, or a folder as it is."""
    if isinstance(artifact, Path):
        return artifact
    return artifact.folder if isinstance(artifact, Base) else artifact.files


def _require_proof(proof: object, origin: str) -> None:
    if proof is not _PROOF:
        raise TypeError(f"{origin}; it is never constructed by hand")


@overload
def attest(folder: Path, manifest: BundleManifest, digest: str, files: Snapshot) -> Bundle: ...
@overload
def attest(folder: Path, manifest: ReturnManifest, digest: str, files: Snapshot) -> Return: ...
@overload
def attest(folder: Path, manifest: PlugInManifest, digest: str, files: Snapshot) -> PlugIn: ...
def attest(folder: Path, manifest: Manifest, digest: str, files: Snapshot) -> Bundle | Return | PlugIn:
    """The artifact of a folder that was verified, or sealed, by the caller. For `verify` and `sealing` alone.

    Args:
        folder: where it lies.
        manifest: what its `offsite.json` says.
        digest: SHA-256 of the manifest's bytes, in hex.
        files: those that the manifest lists.
    """
    if isinstance(manifest, BundleManifest):
        return Bundle(folder, manifest, digest, files, _PROOF)
    if isinstance(manifest, ReturnManifest):
        return Return(folder, manifest, digest, files, _PROOF)
    return PlugIn(folder, manifest, digest, files, _PROOF)
