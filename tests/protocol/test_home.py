import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from offsite.errors import OffsiteError, StorageError, UsageError
from offsite.protocol.home import Home
from offsite.protocol.signing import PublicKey


def test_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFSITE_HOME", str(tmp_path / "named"))
    assert Home.default().folder == tmp_path / "named"
    monkeypatch.setenv("OFFSITE_HOME", "")
    assert Home.default().folder.name == "offsite"
    monkeypatch.delenv("OFFSITE_HOME")
    assert Home.default().folder.name == "offsite"


def test_identity(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    made = home.create_identity("acme")
    assert home.identity().name == made.name == "acme"
    assert home.identity().public_key == made.public_key
    assert (home.folder / "key.pem").stat().st_mode & 0o777 == 0o600
    assert home.folder.stat().st_mode & 0o777 == 0o700
    assert b"PRIVATE KEY" in (home.folder / "key.pem").read_bytes()


def test_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Home(tmp_path / "home").create_identity("acme")
    finally:
        os.umask(old)
    assert (tmp_path / "home" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700


def test_a_key_is_not_overwritten(tmp_path: Path) -> None:
    home = Home(tmp_path)
    made = home.create_identity("acme")
    with pytest.raises(UsageError, match="has a key already: this party is 'acme'"):
        home.create_identity("other")
    assert home.identity().public_key == made.public_key


@pytest.mark.parametrize("name", ["", ".hidden", "../x", "a/b", "a b", "x" * 65, "é", "a\n", "-x", "\x1b[2J"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(UsageError, match="cannot be a party's name") as caught:
        home.create_identity(name)
    assert not home.folder.exists()
    assert caught.value.what.isprintable()
    key = Home(tmp_path / "other").create_identity("x").public_key
    with pytest.raises(UsageError):
        home.trust(name, key)


def test_no_key_yet(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no key") as caught:
        Home(tmp_path).identity()
    assert "offsite keygen" in (caught.value.next_step or "")


X25519 = X25519PrivateKey.generate().private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)


@pytest.mark.parametrize(("content", "says"), [(b"", "damaged"), (b"\xff" * 99, "damaged"), (X25519, "not an Ed25519")])
def test_damaged_key(tmp_path: Path, content: bytes, says: str) -> None:
    home = Home(tmp_path)
    home.create_identity("acme")
    (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(OffsiteError, match=says) as caught:
        home.identity()
    assert caught.value.next_step


def test_name_that_is_gone(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create_identity("acme")
    (tmp_path / "name").write_bytes(b"\xff\xfe")
    assert home.identity().name
    (tmp_path / "name").unlink()
    with pytest.raises(StorageError):
        home.identity()


def key(tmp_path: Path, name: str) -> PublicKey:
    return Home(tmp_path / f"home-of-{name}").create_identity(name).public_key


def test_trust(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.trusted() == {}
    alice, bob = key(tmp_path, "alice"), key(tmp_path, "bob")
    home.trust("alice", alice)
    home.trust("bob", bob)
    home.trust("alice", alice)  # once more is no mistake
    assert home.trusted() == {"alice": alice, "bob": bob}
    assert home.trusted_key("bob") == bob
    home.distrust("alice")
    assert home.trusted() == {"bob": bob}


def test_a_name_is_one_key_and_a_key_one_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    alice, bob = key(tmp_path, "alice"), key(tmp_path, "bob")
    home.trust("alice", alice)
    with pytest.raises(UsageError, match="'alice' is trusted already"):
        home.trust("alice", bob)
    with pytest.raises(UsageError, match=r"is trusted already, as 'alice'") as caught:
        home.trust("bob", alice)
    assert caught.value.next_step
    assert "has changed" not in caught.value.next_step
    assert home.trusted() == {"alice": alice}


def test_nobody_trusts_themselves(tmp_path: Path) -> None:
    home = Home(tmp_path)
    own = home.create_identity("acme").public_key
    with pytest.raises(UsageError, match="this party's own"):
        home.trust("acme", own)
    assert home.trusted() == {}


def test_a_folder_may_be_text(tmp_path: Path) -> None:
    home = Home(str(tmp_path))  # type: ignore[arg-type]  # who has no type checker
    assert home == Home(tmp_path)
    assert home.create_identity("acme").public_key == home.identity().public_key


def test_nobody_of_that_name(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with pytest.raises(UsageError, match="nobody called 'eve' is trusted") as caught:
        home.trusted_key("eve")
    assert caught.value.reasons == ("trusted: nobody yet",)
    with pytest.raises(UsageError, match="nobody called 'eve' is trusted"):
        home.distrust("eve")


def test_a_mistyped_name_gets_the_nearest_one(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for number, name in enumerate(("hospital", *(f"clinic-{i}" for i in range(20)))):
        other = Home(tmp_path / f"other{number}").create_identity("x")
        home.trust(name, other.public_key)
    with pytest.raises(UsageError, match="nobody called 'hosptial' is trusted; did you mean 'hospital'") as caught:
        home.trusted_key("hosptial")
    assert caught.value.next_step is not None
    assert caught.value.next_step.startswith("give --for hospital, or ")
    assert caught.value.reasons[0].endswith(" and 9 more")  # names enough for a line
    with pytest.raises(UsageError) as caught:
        home.distrust("Hospitall")
    assert caught.value.reasons == ("did you mean 'hospital'?",)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xfe"])
def test_trusted_file_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path / "home")
    home.trust("alice", key(tmp_path, "alice"))
    (home.folder / "trusted" / "bob.pub").write_bytes(content)
    with pytest.raises(OffsiteError, match=r"bob\.pub cannot be read") as caught:
        home.trusted()
    assert caught.value.next_step


def test_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        Home(tmp_path / "file" / "home").create_identity("acme")


def at_once(count: int, act: Callable[[int], object]) -> list[object]:
    """What `act` gives in several threads that begin together, or the error that it raises."""
    found: list[object] = [None] * count
    gate = threading.Barrier(count)

    def run(number: int) -> None:
        gate.wait()
        try:
            found[number] = act(number)
        except OffsiteError as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_several_keygens_one_makes_the_key(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    made = at_once(8, lambda number: home.create_identity(f"acme{number}"))
    (one,) = [identity for identity in made if not isinstance(identity, OffsiteError)]
    assert all(isinstance(error, UsageError) for error in made if error is not one)
    assert home.identity().public_key == one.public_key  # type: ignore[attr-defined]
    assert home.identity().name == one.name  # type: ignore[attr-defined]


def test_of_several_keys_under_one_name_one_is_trusted(tmp_path: Path) -> None:
    home, keys = Home(tmp_path / "home"), [key(tmp_path, f"k{number}") for number in range(6)]
    named = at_once(6, lambda number: home.trust("alice", keys[number]))
    assert sum(error is None for error in named) == 1
    assert home.trusted_key("alice") in keys
    others = at_once(6, lambda number: home.trust(f"other{number}", keys[number]))
    assert sum(error is None for error in others) == 5  # all but the one that has a name
    assert set(home.trusted().values()) == set(keys)


def test_what_a_killed_keygen_left_is_removed(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.folder.mkdir()
    (home.folder / ".key.pem.0a1b2c3d.tmp").write_bytes(b"half a private key")
    home.create_identity("acme")
    assert not list(home.folder.glob(".*.tmp"))


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("inner", ["", "trusted"])
def test_a_home_that_others_may_write_is_refused(inner: str, mode: int, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create_identity("acme")
    home.trust("alice", key(tmp_path, "alice"))
    assert (home.folder / "trusted").stat().st_mode & 0o777 == 0o700
    (home.folder / inner).chmod(mode)
    for use in (home.trusted, home.roles, lambda: home.trust("bob", key(tmp_path, "bob"))):
        with pytest.raises(OffsiteError, match="other users may write to") as caught:
            use()
        assert "chmod 700" in (caught.value.next_step or "")
    (home.folder / inner).chmod(0o755)  # others may read it: the key file is closed by itself
    assert list(home.trusted()) == ["alice"]


def test_a_key_has_a_role(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    alice, bob, carol = (key(tmp_path, name) for name in ("alice", "bob", "carol"))
    home.trust("alice", alice, "model-owner")
    home.trust("bob", bob, "data-owner")
    home.trust("carol", carol)
    assert home.roles() == {alice.hex: "model-owner", bob.hex: "data-owner", carol.hex: None}
    assert home.trusted() == {"alice": alice, "bob": bob, "carol": carol}
    home.trust("alice", alice)  # the role remains
    home.trust("carol", carol, "data-owner")
    assert home.roles() == {alice.hex: "model-owner", bob.hex: "data-owner", carol.hex: "data-owner"}
