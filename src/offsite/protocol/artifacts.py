"""The frozen values that pass between stages. Bundle and Return are made by verifying or by sealing, nowhere else."""

from dataclasses import dataclass
from pathlib import Path

from offsite.protocol.manifest import BundleManifest, PlugInManifest, ReturnManifest


@dataclass(frozen=True)
class Base:
    """A base checkpoint folder: ordinary Hugging Face files, safetensors only."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # may have come as text


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `digest` is the SHA-256 of its manifest's bytes and names it in the chain."""

    folder: Path
    manifest: BundleManifest
    digest: str


@dataclass(frozen=True)
class Return:
    """A verified return; `digest` is the SHA-256 of its manifest's bytes."""

    folder: Path
    manifest: ReturnManifest
    digest: str


@dataclass(frozen=True)
class PlugIn:
    """A plug-in: an adapter folder for the base, or a complete checkpoint."""

    folder: Path
    manifest: PlugInManifest
    digest: str
