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


P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def times_eight_is_zero(raw: bytes) -> bool:
    """Whether 8 times the point that 32 bytes encode is the neutral element; RFC 8032, section 5.1."""
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * pow(2, (P - 1) // 4, P) % P
    assert x * x % P == square  # it is on the curve
    for _ in range(3):  # doubled
        product = D * x * x * y * y % P
        x, y = 2 * x * y * pow(1 + product, -1, P) % P, (y * y + x * x) * pow(1 - product, -1, P) % P
    return (x, y) == (0, 1)


WEAK = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]


@pytest.mark.parametrize("raw", WEAK)
def test_points_of_small_order_are_no_keys(raw: str) -> None:
    assert times_eight_is_zero(bytes.fromhex(raw))
    assert PublicKey.from_hex(raw).is_weak
    with pytest.raises(UsageError, match="is a weak one"):
        PublicKey.from_openssh(PublicKey.from_hex(raw).openssh("eve"))


@pytest.mark.parametrize("y", [P, P + 1, 2**255 - 1])
def test_a_number_that_is_not_written_in_the_standard_way_is_no_key(y: int) -> None:
    assert PublicKey(y.to_bytes(32, "little")).is_weak


def test_real_keys_are_not_weak() -> None:
    for number in range(20):
        key = Identity("x", Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))).public_key
        assert not times_eight_is_zero(key.raw)
        assert not key.is_weak
