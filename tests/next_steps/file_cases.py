"""Steps of errors about keys, signed folders, and files on the disk."""

import base64
import errno
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from artifacts import lora_return, packed
from next_steps.owner_cases import backup
from next_steps.source_cases import unreadable
from next_steps.world import (
    EVAL,
    OUT,
    PACK,
    PLUG,
    TUNE,
    Case,
    Command,
    Spoil,
    World,
    as_advised,
    kept,
    restored,
    then,
)
from offsite.cli import main
from offsite.evaluation import evaluate
from offsite.models.loading import load_model
from offsite.protocol.verify import verify_bundle
from offsite.storage import lock, snapshot
from offsite.storage.checkpoint_folder import WEIGHTS
from offsite.storage.lock import alone_in, waiting_in

HOME, VERIFY, FILES = "protocol/home.py", "protocol/verify.py", "storage/files.py"
ADD = "trust add other {folder}/other.pub --home {owner}"
VERIFIED = "verify {folder}/bundle --home {tuner}"


def curve(world: World) -> Any:
    return generate_private_key(SECP256R1())


def other_kind_of_key(world: World) -> None:
    key = world.folder / "acme-home" / "key.pem"
    shutil.copy(key, world.folder / "backup.pem")
    forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(generate_private_key(SECP256R1()).private_bytes(*forms))


def other_kind_of_public_key(world: World) -> None:
    public = generate_private_key(SECP256R1()).public_key()
    forms = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (world.folder / "other.pub").write_bytes(public.public_bytes(*forms))


def made_by_keygen(world: World, step: str) -> None:
    assert "makes it with `offsite keygen`" in step
    (world.folder / "other.pub").unlink()
    assert main(world.words("keygen --name other --home {folder}/other-home --out {folder}/other.pub")) == 0


def damaged_trust(world: World) -> None:
    assert main(world.words("keygen --home {tuner} --out {folder}/hospital.pub")) == 0
    (key,) = (world.folder / "acme-home").rglob("hospital*")
    key.write_text("ssh-ed25519 x")


def added_again(world: World, step: str) -> None:
    (key,) = (world.folder / "acme-home").rglob("hospital*")
    key.unlink()
    assert main(world.words(as_advised(world, step))) == 0


def part_of_the_data(world: World) -> None:
    (world.folder / "rows").mkdir()
    shutil.copy(world.folder / "rows.jsonl", world.folder / "rows" / "a.jsonl")


def elsewhere(world: World, step: str) -> str:
    assert step.startswith("name a place in another folder: --row-scores ")
    return f"{PATTERN} --row-scores {shlex.quote(step.rpartition('--row-scores ')[2].strip(chr(39)))}"


def refused_by_its_recipient(world: World) -> None:
    """As of a base with something in it that only the recipient's rules see."""
    from offsite.protocol import verify

    world.patch.setattr(verify, "BUNDLE_RULES", (lambda signed: ["config.json is odd"],))


def corrected(world: World, step: str) -> None:
    world.patch.undo()


def more_than_is_permitted(world: World) -> None:
    bundle = packed(world.folder / "base", world.folder / "strict", world.parties, max_rank=2)
    lora_return(bundle, world.folder / "other", world.parties.data_owner, rank=4)


def within_it(world: World, step: str) -> None:
    bundle = verify_bundle(world.folder / "strict", world.parties.data_owner)
    shutil.rmtree(world.folder / "other")
    lora_return(bundle, world.folder / "other", world.parties.data_owner, rank=2)


def no_permission(world: World) -> None:
    from offsite.protocol import verify

    def refused(path: Path, most: int) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    world.patch.setattr(verify, "read_bounded", refused)


def flipped(world: World) -> None:
    file = world.folder / "bundle" / WEIGHTS
    shutil.copy(file, world.folder / "sent")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def sent_again(world: World, step: str) -> None:
    shutil.copy(world.folder / "sent", world.folder / "bundle" / WEIGHTS)


def full(error: int) -> Spoil:
    """A disk to which nothing can be written, for one of several reasons."""

    def refuse(world: World) -> None:
        def refused(descriptor: int, content: Any) -> int:
            raise OSError(error, os.strerror(error))

        world.patch.setattr(os, "write", refused)

    return refuse


def freed(world: World, step: str) -> None:
    world.patch.undo()


def alone(name: str) -> Command:
    """Work in a folder in which another one works already, or in another folder."""

    def run(world: World) -> None:
        with (
            alone_in(world.folder / "run", "tuning", "wait for it or stop it"),
            alone_in(world.folder / name, "tuning", "wait for it or stop it"),
        ):
            pass

    return run


def cut(world: World) -> None:
    kept(WEIGHTS)(world)
    content = (world.folder / "kept" / WEIGHTS).read_bytes()
    (world.folder / "base" / WEIGHTS).write_bytes(content[:-9])


def read_again(change: Callable[[World], object] = lambda world: None) -> Command:
    """Load a bundle that was verified before, after something happened to its files."""

    def run(world: World) -> None:
        import torch

        bundle = verify_bundle(world.folder / "bundle", world.parties.data_owner)
        change(world)
        load_model(bundle.files, dtype=torch.float32, device=torch.device("cpu"))

    return run


def broken_disk(world: World) -> None:
    def refused(file: Path, *, hold: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    world.patch.setattr(snapshot, "read_file", refused)


def another_disk(world: World, step: str) -> Command:
    world.patch.undo()
    return read_again()


def weak_key(world: World) -> None:
    """A point of small order in the place of a key."""
    body = b"".join(len(part).to_bytes(4, "big") + part for part in (b"ssh-ed25519", bytes(32)))
    (world.folder / "other.pub").write_text(f"ssh-ed25519 {base64.b64encode(body).decode()} other\n")


def a_sound_key(world: World, step: str) -> None:
    (world.folder / "other.pub").unlink(missing_ok=True)
    assert main(world.words("keygen --name other --home {folder}/other-home --out {folder}/other.pub")) == 0


def waiting(name: str) -> Command:
    """Change a folder while another one does, or another folder."""

    def run(world: World) -> None:
        world.patch.setattr(lock, "_SECONDS", 0.1)
        with waiting_in(world.folder), waiting_in(world.folder / name):
            pass

    return run


def no_memory(world: World) -> None:
    def fails(*_: object, **more: object) -> None:
        raise MemoryError

    world.patch.setattr(evaluate, "evaluate", fails)


LONG = f"{TUNE} --out {{folder}}/{'r' * 250}"
PATTERN = "eval {folder}/base --data '{folder}/rows/*.jsonl'"
CASES = (
    Case("too little memory for a score", "cli/__init__.py", EVAL, "close other programs", corrected, no_memory),
    Case(
        "a role that there is not",
        "cli/keys.py",
        f"{ADD} --role owner",
        "give --role model-owner or",
        then(f"{ADD} --role data-owner"),
        lambda world: a_sound_key(world, ""),
    ),
    Case("a weak key", "protocol/signing.py", ADD, "ask the other party for a key", a_sound_key, weak_key),
    Case("two that change a folder", "storage/lock.py", waiting("."), "end that process", lambda w, s: waiting("base")),
    Case(
        "a key of another kind",
        HOME,
        PACK + OUT,
        "put it back from a backup",
        backup,
        other_kind_of_key,
        "is not an Ed25519 key",
    ),
    Case(
        "a trusted key that is damaged",
        HOME,
        PACK + OUT,
        "remove the file, then add the key again",
        added_again,
        damaged_trust,
    ),
    Case(
        "no public key in a file",
        "protocol/signing.py",
        ADD,
        "a public key file has one line",
        made_by_keygen,
        lambda world: (world.folder / "other.pub").write_text("a key"),
        "this is not a public key",
    ),
    Case(
        "a public key of another kind",
        "protocol/signing.py",
        ADD,
        "a public key file has one line",
        made_by_keygen,
        other_kind_of_public_key,
        "is not an Ed25519 key",
    ),
    Case(
        "scores among the rows",
        "protocol/output_place.py",
        f"{PATTERN} --row-scores {{folder}}/rows/s.jsonl",
        "name a place in another folder",
        elsewhere,
        part_of_the_data,
    ),
    Case(
        "a bundle that its recipient would refuse",
        VERIFY,
        PACK + OUT,
        "correct what is named in the base folder",
        corrected,
        refused_by_its_recipient,
    ),
    Case(
        "a rank that the owner did not permit",
        VERIFY,
        f"{PLUG.replace('/return', '/other')}{OUT}",
        "ask for a return within it",
        within_it,
        more_than_is_permitted,
    ),
    Case(
        "a manifest that nobody may read",
        VERIFY,
        VERIFIED,
        "check the folder's permissions",
        corrected,
        no_permission,
    ),
    Case("a bundle with a flipped bit", VERIFY, VERIFIED, "", sent_again, flipped, "fails verification"),
    Case("a name that is too long", FILES, LONG, "name a folder with a shorter name", then(TUNE + OUT)),
    Case(
        "a disk that is full",
        FILES,
        PACK + OUT,
        "nothing half-written was left",
        freed,
        full(errno.ENOSPC),
        "cannot write",
    ),
    Case(
        "a disk without a quota",
        FILES,
        PACK + OUT,
        "nothing half-written was left",
        freed,
        full(errno.EDQUOT),
        "cannot write",
    ),
    Case(
        "a disk that is read-only",
        FILES,
        PACK + OUT,
        "nothing half-written was left",
        freed,
        full(errno.EROFS),
        "cannot write",
    ),
    Case(
        "two at work in a folder",
        "storage/lock.py",
        alone("run"),
        "wait for it or stop it",
        lambda world, step: alone("other"),
    ),
    Case(
        "weights that nobody may read",
        "storage/safetensors_files.py",
        PACK + OUT,
        "and that you may read it",
        corrected,
        unreadable(f"base/{WEIGHTS}"),
    ),
    Case("weights that are cut off", "storage/safetensors_files.py", PACK + OUT, "fetch the file again", restored, cut),
    Case(
        "a bundle that changed after it was verified",
        "storage/snapshot.py",
        read_again(flipped),
        "verify the folder again",
        lambda world, step: sent_again(world, step) or read_again(),
    ),
    Case(
        "a disk that fails after a bundle was verified",
        "storage/snapshot.py",
        read_again(broken_disk),
        "check the folder and its disk",
        another_disk,
    ),
)
