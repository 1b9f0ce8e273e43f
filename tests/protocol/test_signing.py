import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offsite.errors import UsageError
from offsite.protocol.signing import Identity, PublicKey


@pytest.fixture
def identity() -> Identity:
    return Identity("acme", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def test_signature_is_of_these_bytes_this_kind_and_this_key(identity: Identity) -> None:
    signature = identity.sign("bundle", b"document")
    key = identity.public_key
    assert len(signature) == 64
    assert key.verifies(signature, "bundle", b"document")
    assert not key.verifies(signature, "return", b"document")
    assert not key.verifies(signature, "bundle", b"document ")
    assert not key.verifies(signature[:-1], "bundle", b"document")
    assert not key.verifies(b"", "bundle", b"document")
    assert not Identity("x", Ed25519PrivateKey.generate()).public_key.verifies(signature, "bundle", b"document")


@pytest.mark.parametrize("raw", ["00" * 32, "ff" * 32, "01" + "00" * 31])
def test_numbers_that_are_no_proper_key(raw: str) -> None:
    """A stranger may name any 32 bytes as its key; asking for the fingerprint must not fall over."""
    key = PublicKey.from_hex(raw)
    assert key.fingerprint.startswith("SHA256:")
    assert not key.verifies(b"\1" * 64, "bundle", b"document")


def test_key_as_text(identity: Identity) -> None:
    key = identity.public_key
    assert PublicKey.from_hex(key.hex) == key
    assert PublicKey.from_openssh(key.openssh("acme@host")) == key
    assert PublicKey.from_openssh(f"  {key.openssh('x')}\n\n") == key
    assert key.openssh("acme").startswith("ssh-ed25519 AAAA")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_fingerprint_is_that_of_ssh_keygen(identity: Identity, tmp_path: Path) -> None:
    (tmp_path / "x.pub").write_text(identity.public_key.openssh("acme"))
    done = subprocess.run(["ssh-keygen", "-lf", tmp_path / "x.pub"], capture_output=True, text=True, check=True)
    assert identity.public_key.fingerprint in done.stdout


OTHER = generate_private_key(SECP256R1()).public_key()
SECURITY_KEY = (  # it signs more than the bytes that it is given
    "sk-ssh-ed25519@openssh.com "
    "AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIAOhB7/zzhC+HXDdGOdLwJln5NYwm6UNXx3chmQSVTG4AAAABHNzaDo="
)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 !!!! x",
        "-----BEGIN PUBLIC KEY-----",
        SECURITY_KEY,
        OTHER.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode(),
    ],
)
def test_what_is_no_key(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        PublicKey.from_openssh(line)
    assert "ssh-ed25519 AAAA" in (caught.value.next_step or "")


def test_secrets(identity: Identity) -> None:
    other = Identity("x", Ed25519PrivateKey.generate())
    assert len(identity.secret("a")) == 32
    assert identity.secret("a") == identity.secret("a")
    assert len({identity.secret("a"), identity.secret("b"), other.secret("a")}) == 3
    assert identity.secret("a") != identity.private_key.private_bytes_raw()


def test_the_private_key_is_not_shown(identity: Identity) -> None:
    assert identity.private_key.private_bytes_raw().hex() not in repr(identity)
