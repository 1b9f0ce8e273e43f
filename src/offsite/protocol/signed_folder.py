"""A sealed folder that has not been verified yet, how its files are opened, and how findings about it are worded."""

import hashlib
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import VerificationError
from offsite.protocol.home import Home
from offsite.protocol.manifest import (
    MANIFEST,
    BundleManifest,
    Manifest,
    ReturnManifest,
    TensorEntry,
)
from offsite.storage.safetensors_files import (
    TensorRange,
    strict_json,
)

_CONFIG_BYTES = 16 * 2**20  # no JSON file of an artifact is larger; tokenizer.json is never parsed here


@dataclass(frozen=True)
class Sealed:
    """A folder with its parsed manifest, before any rule has passed."""

    folder: Path
    home: Home
    manifest: Manifest
    raw: bytes
    parent: BundleManifest | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def signer(self) -> str:
        """The key that the manifest says has signed it."""
        return self.manifest.signer if isinstance(self.manifest, ReturnManifest) else self.manifest.issuer


Rule = Callable[[Sealed], Iterator[str]]


def names_differ(what: str, found: Set[str], expected: Set[str]) -> Iterator[str]:
    """Findings about names that are too many or missing; long lists are cut."""
    for label, names in (("unexpected", sorted(found - expected)), ("missing", sorted(expected - found))):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            yield f"{what}: {label} {', '.join(repr(name[:120]) for name in names[:6])}{more}"


def entries_differ(
    entries: Mapping[str, TensorEntry], held: Mapping[str, TensorRange], where: str = "the file"
) -> Iterator[str]:
    """Findings about tensors whose shape or dtype in a file is not what the manifest says."""
    for name in sorted(set(entries) & set(held)):
        found = TensorEntry.model_construct(shape=held[name].shape, dtype=held[name].dtype)
        if (found.shape, found.dtype) != (entries[name].shape, entries[name].dtype):
            yield f"{name} is {_shown(found)} in {where}, {_shown(entries[name])} in {MANIFEST}"


def manifest_tensors_differ(found: dict[str, TensorEntry], expected: dict[str, TensorEntry]) -> Iterator[str]:
    """Findings about tensors that a manifest names and those that it may name."""
    yield from names_differ("tensors", set(found), set(expected))
    for name in sorted(set(found) & set(expected)):
        if found[name] != expected[name]:
            yield f"{name} is {_shown(found[name])}, expected {_shown(expected[name])}"


def _shown(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def read_json(sealed: Sealed, name: str) -> object:
    """A JSON file of the folder.

    Raises:
        VerificationError: it is no plain file, too large, or not JSON.
    """
    raw = read_bounded(plain_file(sealed.folder, name), _CONFIG_BYTES)
    if len(raw) > _CONFIG_BYTES:
        raise VerificationError(f"{name} is over {_CONFIG_BYTES} bytes")
    try:
        return strict_json(raw)
    except ValueError as error:
        raise VerificationError(f"{name} is not JSON: {error}") from None


def is_plain(file: Path) -> bool:
    """Whether there is a file of that name, and not a link, folder, pipe or device."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except FileNotFoundError:
        return False


def plain_file(folder: Path, name: str) -> Path:
    """A file that may be opened: a link may lead out of the folder, and reading a pipe may never end.

    Raises:
        VerificationError: it is no plain file.
        FileNotFoundError: there is none.
    """
    if not stat.S_ISREG((folder / name).lstat().st_mode):
        raise VerificationError(f"{name!r} is no plain file")
    return folder / name


def read_bounded(file: Path, limit: int) -> bytes:
    """At most one byte more than `limit`, which shows that the file is larger."""
    with file.open("rb") as stream:
        return stream.read(limit + 1)
