"""The folder that is being verified, as the rules of verification see it, and findings that several rules share."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from offsite.errors import OffsiteError, StorageError, VerificationError
from offsite.protocol.home import Home
from offsite.protocol.manifest import (
    MANIFEST,
    BundleManifest,
    Manifest,
    ReturnManifest,
    TensorEntry,
)
from offsite.storage.safetensors_files import TensorRange
from offsite.storage.snapshot import SETTINGS_BYTES, ReadFile
from offsite.storage.strict_json import strict_json

CONFIG_BYTES = 16 * 2**20  # no JSON file of an artifact is larger, except a tokenizer's


@dataclass(frozen=True)
class SignedFolder:
    """A folder that is being verified: its parsed manifest, and the files that the manifest lists, as they were read.

    `parent` is the manifest of the bundle that a return answers, if it is known.
    """

    folder: Path
    home: Home
    manifest: Manifest
    raw: bytes  # of the manifest
    parent: BundleManifest | None = None
    files: Mapping[str, ReadFile | OffsiteError | OSError] = field(default_factory=dict)  # an error: why it is not read

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest's bytes, in hex."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def signer(self) -> str:
        """The public key, in hex, that the manifest names as its signer."""
        return self.manifest.signer if isinstance(self.manifest, ReturnManifest) else self.manifest.issuer

    def names(self) -> Set[str]:
        """The names of the listed files that could be read."""
        return {name for name, file in self.files.items() if isinstance(file, ReadFile)}

    def file(self, name: str) -> ReadFile:
        """The size, hash and content of the file `name`, as they were read.

        Raises:
            VerificationError: the file is missing, not listed, or not a regular file.
            OSError: the file could not be read.
        """
        found = self.files.get(name)
        if found is None or isinstance(found, FileNotFoundError):
            raise VerificationError(f"{name} is missing")
        if isinstance(found, ReadFile):
            return found
        raise found

    def read(self, name: str) -> bytes:
        """The content of a file that contains no tensors.

        Raises:
            VerificationError: the file is missing, not a regular file, or too large to be kept in memory.
            OSError: the file could not be read.
        """
        content = self.file(name).content
        if content is None:
            raise VerificationError(
                f"{name} is too large: all files other than the weights may take {SETTINGS_BYTES} bytes together"
            )
        return content

    def header(self, name: str) -> dict[str, TensorRange]:
        """The position of each tensor in the safetensors file `name`, by tensor name.

        Raises:
            VerificationError: the file is missing or not a regular file.
            StorageError: its header is malformed.
            OSError: the file could not be read.
        """
        file = self.file(name)
        if file.header is None:
            raise file.problem or StorageError(f"{name} holds no tensors")
        return dict(file.header)


Rule = Callable[[SignedFolder], Iterator[str]]


def names_differ(what: str, found: Set[str], expected: Set[str]) -> Iterator[str]:
    """Yield a finding that lists unexpected names and one that lists missing names; each shows at most six names.

    Args:
        what: what the names belong to, such as "weights"; the finding begins with it.
        found: the names that are present.
        expected: the names that must be present.
    """
    for label, names in (("unexpected", sorted(found - expected)), ("missing", sorted(expected - found))):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            yield f"{what}: {label} {', '.join(repr(name[:120]) for name in names[:6])}{more}"


def entries_differ(
    entries: Mapping[str, TensorEntry], held: Mapping[str, TensorRange], where: str = "the file"
) -> Iterator[str]:
    """Yield a finding for each tensor whose shape or dtype in a file differs from the manifest's entry.

    Args:
        entries: the manifest's entries, by tensor name.
        held: the tensors in the file, by name; names that are not in both are ignored.
        where: the file, as the finding names it.
    """
    for name in sorted(set(entries) & set(held)):
        found = TensorEntry.model_construct(shape=held[name].shape, dtype=held[name].dtype)
        if (found.shape, found.dtype) != (entries[name].shape, entries[name].dtype):
            yield f"{name} is {_shown(found)} in {where}, {_shown(entries[name])} in {MANIFEST}"


def manifest_tensors_differ(found: dict[str, TensorEntry], expected: dict[str, TensorEntry]) -> Iterator[str]:
    """Yield findings for tensors in a manifest (`found`) that are unexpected, missing, or differ from `expected`."""
    yield from names_differ("tensors", set(found), set(expected))
    for name in sorted(set(found) & set(expected)):
        if found[name] != expected[name]:
            yield f"{name} is {_shown(found[name])}, expected {_shown(expected[name])}"


def _shown(entry: TensorEntry) -> str:
    """The dtype and the shape of an entry as text."""
    return f"{entry.dtype} {list(entry.shape)}"


def read_json(signed: SignedFolder, name: str, most: int | None = None) -> object:
    """Parse the JSON file `name` of the folder, which may have at most `most` bytes; None: as a config.

    Raises:
        VerificationError: the file cannot be read, is too large, or is not JSON.
    """
    raw, most = signed.read(name), CONFIG_BYTES if most is None else most
    if len(raw) > most:
        raise VerificationError(f"{name} is over {most} bytes")
    try:
        return strict_json(raw)
    except ValueError as error:
        raise VerificationError(f"{name} is not JSON: {error}") from None
