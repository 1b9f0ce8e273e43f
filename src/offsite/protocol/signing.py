"""Ed25519 keys and detached signatures over a file's exact bytes.

The signed message is a line with the kind of document, then the file's bytes. So a bundle's signature is never valid
for a return. Public keys are exchanged in OpenSSH's one-line format, so `ssh-keygen -lf` shows the same fingerprint.
"""

import base64
import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from offsite.errors import UsageError

SIGNATURE_BYTES = 64
_PRIME = 2**255 - 19  # of the field of Ed25519
# The y coordinates of the eight points whose order divides 8: orders 1, 2 and 4, then those of order 8.
_SMALL_ORDER = frozenset(
    {
        0, 1, _PRIME - 1,
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class PublicKey:
    """A party's public key (Ed25519): 32 bytes, which manifests contain as 64 hex digits."""

    raw: bytes

    @classmethod
    def from_hex(cls, text: str) -> "PublicKey":
        """Construct the key from 64 hex digits, the form in which manifests contain it."""
        return cls(bytes.fromhex(text))

    @classmethod
    def from_openssh(cls, line: str) -> "PublicKey":
        """Construct the key from one line of an OpenSSH public key file.

        Raises:
            UsageError: the line is not an Ed25519 public key.
        """
        try:
            key = serialization.load_ssh_public_key(line.strip().encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError("this is not a public key", reasons=[str(error)], next_step=_KEY_HINT) from None
        if not isinstance(key, Ed25519PublicKey) or not line.lstrip().startswith(
            "ssh-ed25519"
        ):  # excludes security keys
            raise UsageError("this public key is not an Ed25519 key", next_step=_KEY_HINT)
        found = cls(key.public_bytes_raw())
        if found.is_weak:
            raise UsageError(
                "this public key is a weak one, for which anybody can make signatures",
                next_step="ask the other party for a key that `offsite keygen` or `ssh-keygen -t ed25519` made",
            )
        return found

    @property
    def is_weak(self) -> bool:
        """Whether the key is a point of small order, or is not written in the one way that is standard.

        A signature for a point of small order can be made without any private key (RFC 8032, section 5.1.3 and 8.4 for
        the encoding; the points are those with y in a short list).
        """
        y = int.from_bytes(self.raw, "little") & ((1 << 255) - 1)  # the highest bit is the sign of x
        return y >= _PRIME or y in _SMALL_ORDER

    @property
    def hex(self) -> str:
        """The key as 64 hex digits."""
        return self.raw.hex()

    def openssh(self, comment: str) -> str:
        """The key as one line in OpenSSH's format, with a newline at the end; `comment` ends the line."""
        line = Ed25519PublicKey.from_public_bytes(self.raw).public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return f"{line.decode()} {comment}\n"

    @property
    def fingerprint(self) -> str:
        """A short text that identifies the key, to be compared by telephone; `ssh-keygen -lf` prints the same text."""
        blob = base64.b64decode(self.openssh("x").split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def verifies(self, signature: bytes, kind: str, document: bytes) -> bool:
        """Whether `signature` was made with this key over exactly the bytes `document`, as a document of this kind."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _message(kind, document))
        except (InvalidSignature, ValueError):
            return False
        return True


_KEY_HINT = "a public key file has one line, 'ssh-ed25519 AAAA... name'; the other party makes it with `offsite keygen`"


@dataclass(frozen=True)
class Identity:
    """A party's name and private key; the private key is never sent to anybody."""

    name: str
    private_key: Ed25519PrivateKey

    @property
    def public_key(self) -> PublicKey:
        """The public key that belongs to the private key."""
        return PublicKey(self.private_key.public_key().public_bytes_raw())

    def sign(self, kind: str, document: bytes) -> bytes:
        """Sign the bytes of a document of this kind, such as "bundle"; returns a detached signature of 64 bytes."""
        return self.private_key.sign(_message(kind, document))

    def secret(self, purpose: str) -> bytes:
        """A secret of 32 bytes that only this party can derive (HKDF-SHA256 of its private key), one per purpose."""
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"offsite " + purpose.encode())
        return kdf.derive(self.private_key.private_bytes_raw())


def _message(kind: str, document: bytes) -> bytes:
    """The bytes that are signed: a line with the kind of the document, then the document."""
    return b"offsite " + kind.encode() + b" v1\n" + document
