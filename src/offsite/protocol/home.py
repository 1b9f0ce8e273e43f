"""Reads and writes the home folder of a party, with its own key, the keys that it trusts, and its ledger."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offsite.encodings import decode_text
from offsite.errors import OffsiteError, UsageError
from offsite.protocol.signing import Identity, PublicKey
from offsite.spelling import nearest, suggest
from offsite.storage.files import private_folder, replace_file, storage_errors
from offsite.storage.lock import waiting_in

Role = Literal["model-owner", "data-owner"]
_ROLE = re.compile(r" role=(model-owner|data-owner)\s*$")  # at the end of a trusted key's line
_LISTED = 12  # trusted names that an error lists
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Home:
    """A party's home folder.

    It contains `key.pem` (the private key, mode 0600), `name`, `trusted/NAME.pub` and `ledger.sqlite`.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # callers may pass a string

    @classmethod
    def default(cls) -> "Home":
        """The home in the folder `$OFFSITE_HOME`, or if that is not set, in the platform's folder for user data."""
        named = os.environ.get("OFFSITE_HOME")
        return cls(Path(named) if named else platformdirs.user_data_path("offsite", appauthor=False))

    @property
    def ledger(self) -> Path:
        """The path of the ledger, an SQLite file that the model owner writes."""
        return self.folder / "ledger.sqlite"

    @property
    def has_identity(self) -> bool:
        """Whether the home has a private key; `identity` says whether it can be read."""
        return self._key.exists()

    def create_identity(self, name: str) -> Identity:
        """Create this party's key pair; the private key is written with file mode 0600 and never shown.

        Raises:
            UsageError: the name is not a valid name for a party, or the home has a key already.
            StorageError: the home cannot be written.
        """
        _check_name(name)
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            return self._create_identity(name)

    def _create_identity(self, name: str) -> Identity:
        """Create the key pair, while no other process changes the home; raises as `create_identity`."""
        if self._key.exists():
            raise UsageError(
                f"{self.folder} has a key already: this party is {self.identity().name!r}",
                next_step="`offsite keygen --out FILE.pub` without --name writes its public key again; "
                "for a second party name another folder with --home",
            )
        identity = Identity(name, Ed25519PrivateKey.generate())
        pem = identity.private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        replace_file(self.folder / "name", name.encode())
        replace_file(self._key, pem, mode=0o600)
        return identity

    def identity(self) -> Identity:
        """This party's name and key pair, read from the home.

        Raises:
            UsageError: the home has no key yet.
            OffsiteError: the key file is damaged or readable by others.
        """
        if not self._key.exists():
            raise UsageError(
                f"{self.folder} holds no key, so this party cannot sign or be addressed",
                next_step="make one with `offsite keygen --name NAME --out NAME.pub`, or name the right --home",
            )
        _require_own(self.folder)
        with storage_errors(self._key):
            if os.name == "posix" and self._key.stat().st_mode & 0o077:
                raise OffsiteError(
                    f"the private key {self._key} is readable by others",
                    next_step=f"take the permission away with `chmod 600 {shlex.quote(str(self._key))}`; "
                    "if others had access, make a new key in a new home and exchange it again",
                )
            content = self._key.read_bytes()
            name = (self.folder / "name").read_text(encoding="utf-8", errors="replace").strip()
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError) as error:
            raise OffsiteError(
                f"the private key {self._key} is damaged", reasons=[str(error)], next_step=_KEY_LOST
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise OffsiteError(f"the private key {self._key} is not an Ed25519 key", next_step=_KEY_LOST)
        return Identity(name, key)

    def trust(self, name: str, key: PublicKey, role: Role | None = None) -> None:
        """Store another party's key as trusted, under a name that this party chooses.

        Args:
            name: the name.
            key: the party's public key.
            role: what the key may sign: a "model-owner" bundles and plug-ins, a "data-owner" returns. None: bundles and
                returns; a role that was given before remains.

        Raises:
            UsageError: the name is not valid, or is that of another trusted key; or the key is already trusted under
                another name, or is this party's own key.
        """
        _check_name(name)
        if self._key.exists() and key == self.identity().public_key:
            raise UsageError(
                f"the key {key.fingerprint} is this party's own, which needs no trust",
                next_step="add the key that the other party sent, or name the right --home",
            )
        self.trusted()  # raises if others could have changed it
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private_folder(self.folder / "trusted")
        with self._alone():
            self._trust(name, key, role)

    def _trust(self, name: str, key: PublicKey, role: Role | None) -> None:
        """Store a key, while no other process changes the home; raises as `trust`."""
        for known, other in self.trusted().items():
            if other == key and known != name:
                raise UsageError(
                    f"the key {key.fingerprint} is trusted already, as {known!r}",
                    next_step=f"call that party {known}; for another name, `offsite trust remove {known}` first",
                )
            if known == name and other != key:
                raise UsageError(
                    f"{known!r} is trusted already with the key {other.fingerprint}",
                    next_step=f"if the key has changed for a good reason, `offsite trust remove {known}` first",
                )
        kept = role or self.roles().get(key.hex)
        comment = f"{name} role={kept}" if kept else name
        replace_file(self.folder / "trusted" / f"{name}.pub", key.openssh(comment).encode())

    def distrust(self, name: str) -> None:
        """Remove a party's key from the trusted keys.

        Raises:
            UsageError: no trusted key has that name.
        """
        if name not in self.trusted():
            raise UsageError(
                f"nobody called {name!r} is trusted",
                reasons=[suggest(name, self.trusted())] if self.trusted() else (),
                next_step="see `offsite trust list`",
            )
        with self._alone(), storage_errors(self.folder):
            (self.folder / "trusted" / f"{name}.pub").unlink(missing_ok=True)

    def trusted(self) -> Mapping[str, PublicKey]:
        """All trusted keys, by the names that this party chose for them."""
        return {name: key for name, (key, _) in self._trusted_parties().items()}

    def roles(self) -> Mapping[str, Role | None]:
        """What each trusted key may sign (see `trust`), by the key in hex."""
        return {key.hex: role for key, role in self._trusted_parties().values()}

    def _trusted_parties(self) -> dict[str, tuple[PublicKey, Role | None]]:
        """The key and the role of each trusted party, by name."""
        folder = self.folder / "trusted"
        _require_own(self.folder)
        _require_own(folder)
        return {file.stem: _trusted_file(file) for file in sorted(folder.glob("*.pub"))}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Context manager: other processes that change the home wait; what killed ones left half-written is removed."""
        with waiting_in(self.folder):
            for left in self.folder.glob(".*.tmp"):
                with storage_errors(left):
                    left.unlink(missing_ok=True)
            yield

    def trusted_key(self, name: str) -> PublicKey:
        """The key of the party that is trusted under this name.

        Raises:
            UsageError: no trusted key has that name.
        """
        trusted = self.trusted()
        if name not in trusted:
            close = nearest(name, trusted)
            listed = [*trusted][:_LISTED]
            more = f" and {len(trusted) - _LISTED} more" if len(trusted) > _LISTED else ""
            raise UsageError(
                f"nobody called {name!r} is trusted" + (f"; did you mean {close!r}?" if close else ""),
                reasons=[f"trusted: {', '.join(listed) or 'nobody yet'}{more}"],
                next_step=(f"give --for {close}, or " if close else "")
                + f"add the party's public key with `offsite trust add {name} FILE.pub`",
            )
        return trusted[name]

    @property
    def _key(self) -> Path:
        """The path of the private key."""
        return self.folder / "key.pem"


_KEY_LOST = "put it back from a backup; if it is lost, make a new key in a new home and exchange it again"


def _trusted_file(file: Path) -> tuple[PublicKey, Role | None]:
    """Read a trusted key and its role; OffsiteError if the file cannot be read."""
    try:
        line = decode_text(file.read_bytes())
        found = _ROLE.search(line)
        role: Role | None = None if found is None else "model-owner" if found[1] == "model-owner" else "data-owner"
        return PublicKey.from_openssh(line), role
    except (OSError, UnicodeError, UsageError) as error:
        reasons = error.reasons if isinstance(error, UsageError) else [str(error)]
        raise OffsiteError(
            f"the trusted key {file} cannot be read",
            reasons=reasons,
            next_step=f"remove the file, then add the key again with `offsite trust add {file.stem} FILE.pub`",
        ) from None


def _require_own(folder: Path) -> None:
    """Refuse a folder that other users may write: they could add a key, or replace one.

    Raises:
        OffsiteError: others may write it.
    """
    with contextlib.suppress(OSError):
        if os.name == "posix" and folder.stat().st_mode & 0o022:
            raise OffsiteError(
                f"other users may write to {folder}",
                reasons=[f"the mode of {folder} is {folder.stat().st_mode & 0o777:o}, expected 700"],
                next_step=f"`chmod 700 {shlex.quote(str(folder))}`, and compare the fingerprints that "
                "`offsite trust list` prints with the other parties again",
            )


def _check_name(name: str) -> None:
    """Raise UsageError unless a name is valid for a party."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:64]!r} cannot be a party's name",
            reasons=["expected a letter or digit, then up to 63 letters, digits, dots, dashes or underscores"],
            next_step="choose such a name",
        )
