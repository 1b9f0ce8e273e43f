"""Steps of errors of the owner who takes a return in and plugs it in, and of the ledger."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from artifacts import bottleneck_return, edit_weights, full_return, lora_return, packed, sign_again
from model_owner.importing.test_text_tower import whole_model
from model_owner.plugging_in.test_whole_checkpoint import tuned
from next_steps.picture_cases import and_pictures
from next_steps.world import OUT, PLUG, TUNE, Case, Command, Spoil, World, then
from offsite.cli import main
from offsite.config import PlugInSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.carry_map import CarryMap, render_carry_map
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import RECORD
from offsite.model_owner.intake import intake, issued_bundle
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.model_owner.plugging_in.plugged_tensors import to_base
from offsite.progress import Event, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.protocol.home import Home
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import verify_bundle, verify_return
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import tiny_base

LEDGER, FORM, TENSORS = (
    "model_owner/ledger.py",
    "model_owner/plugging_in/check_plug_in.py",
    "model_owner/plugging_in/plugged_tensors.py",
)
CARRY, CHOOSE, INTAKE = (
    "model_owner/plugging_in/carry.py",
    "model_owner/plugging_in/choose_plug_in.py",
    "model_owner/intake.py",
)
OTHER = PLUG.replace("/return", "/other")
PICTURED = "plug-in {folder}/encoder {folder}/encoder-return --home {owner}"


def returned(make: Callable[..., object], **settings: Any) -> Spoil:
    """Another return for the bundle."""

    def write(world: World) -> None:
        home = world.parties.data_owner
        make(verify_bundle(world.folder / "bundle", home), world.folder / "other", home, **settings)

    return write


def tuned_the_other_way(world: World) -> None:
    assert main(world.words(f"{TUNE} --lr 0.02 --out {{folder}}/other")) == 0

    def turned(held: dict[str, Any]) -> None:
        held.update({name: -array for name, array in held.items() if ".lora_B." in name})

    edit_weights(world.folder / "other" / ADAPTER_WEIGHTS, turned)
    sign_again(world.folder / "other", world.parties.data_owner.identity())


def almost_too_large(world: World) -> None:
    returned(lora_return)(world)

    def enlarged(held: dict[str, Any]) -> None:
        next(array for name, array in held.items() if ".lora_B." in name)[0, 0] = 3e38

    edit_weights(world.folder / "other" / ADAPTER_WEIGHTS, enlarged)
    sign_again(world.folder / "other", world.parties.data_owner.identity())


def rewritten(statement: str, value: Callable[[World], str | bytes | None] = lambda world: None) -> Spoil:
    """A change of the ledger, of which there is a backup."""

    def change(world: World) -> None:
        ledger = world.parties.owner.ledger
        shutil.copy(ledger, world.folder / "ledger.backup")
        found = value(world)
        with contextlib.closing(sqlite3.connect(ledger)) as db, db:
            db.execute(statement, () if found is None else (found,))

    return change


def no_database(world: World) -> None:
    shutil.copy(world.parties.owner.ledger, world.folder / "ledger.backup")
    world.parties.owner.ledger.write_bytes(b"no database, but a text that is long enough to look like one" * 20)


def backup(world: World, step: str) -> None:
    shutil.copy(world.folder / "ledger.backup", world.parties.owner.ledger)


def other_map(world: World) -> str:
    digest = verify_bundle(world.folder / "bundle", world.parties.data_owner).digest
    return render_carry_map(CarryMap.of((0, 1, 5)), digest)


def adapted_everywhere(world: World) -> None:
    """A bundle whose compressed blocks have adapters, and a ledger without its map."""
    every = {"bottom": None, "top": None, "keep": None, "placement": "every"}
    bundle = packed(world.folder / "base", world.folder / "every", world.parties, **every, mlp_width=0.5)
    lora_return(bundle, world.folder / "other", world.parties.data_owner)
    rewritten("UPDATE bundles SET carry = NULL")(world)


def twice(world: World) -> None:
    """The same base, so that what is too large for bf16 is a fault of the return alone."""
    tiny_base(world.folder / "half", blocks=3, dtype="bf16")
    bundle = packed(world.folder / "half", world.folder / "half-bundle", world.parties)
    full_return(
        bundle, world.folder / "other", world.parties.data_owner, change=lambda name, held: np.full_like(held, 3.4e38)
    )


def plugged(home: str, taken: bool = True) -> Command:
    """Plug the return in by the function, with or without taking it in first."""

    def run(world: World) -> None:
        owner = Home(world.folder / home)
        verified = intake(world.folder / "return", owner) if taken else verify_return(world.folder / "return", owner)
        plug_in(Base(world.folder / "base"), verified, world.folder / "out", PlugInSpec(), owner)

    return run


def its_bundle(home: str) -> Command:
    return lambda world: issued_bundle(
        verify_return(world.folder / "return", world.parties.owner), Home(world.folder / home)
    )


def meanwhile(progress: bool) -> Command:
    """Plug in while somebody writes to the base, or while nobody does."""

    def run(world: World) -> None:
        weights = world.folder / "base" / WEIGHTS

        def touch(event: Event) -> None:
            if event.stage == "writing the plug-in":
                weights.write_bytes(weights.read_bytes())

        taken = intake(world.folder / "return", world.parties.owner)
        seen = touch if progress else silent
        plug_in(Base(world.folder / "base"), taken, world.folder / "out", PlugInSpec(), world.parties.owner, seen)

    return run


def named(name: str) -> Command:
    """A tensor of the bundle by its name in the base."""

    def run(world: World) -> None:
        issued = issued_bundle(verify_return(world.folder / "return", world.parties.owner), world.parties.owner)
        to_base(name, open_base(Base(world.folder / "base")), issued)

    return run


def whole(base: str = "base") -> Command:
    """Plug a return for a language model into the multi-modal checkpoint that it is out of."""

    def run(world: World) -> None:
        place, owner = world.folder / "tower", world.parties.owner
        spec, taken = PlugInSpec(whole=place / "whole"), intake(place / "return", owner)
        plug_in(Base(place / base), taken, world.folder / "out", spec, owner)

    return run


def tower(change: Callable[[Path], object]) -> Spoil:
    def make(world: World) -> None:
        place = world.folder / "tower"
        whole_model(place / "whole", "llava")
        tuned(place / "whole", place, world.parties)
        shutil.copytree(place / "whole", place / "right")
        change(place)

    return make


def another_checkpoint(place: Path) -> None:
    tensors = load_file(place / "whole" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, place / "whole" / WEIGHTS, {"format": "pt"})


def the_right_one(world: World, step: str) -> None:
    shutil.copy(world.folder / "tower" / "right" / WEIGHTS, world.folder / "tower" / "whole" / WEIGHTS)


def imported_again(world: World, step: str) -> Command:
    assert "`offsite import MODEL --out base/`" in step
    import_model(world.folder / "tower" / "whole", world.folder / "tower" / "again")
    return whole("again")


CASES = (
    Case(
        "scores of a plug-in for pictures",
        "model_owner/plugging_in/score_plug_in.py",
        f"{PICTURED}{OUT} --eval-data {{folder}}/rows.jsonl",
        "leave --eval-data out",
        then(PICTURED + OUT),
        and_pictures(),
    ),
    Case(
        "a return that was not taken in",
        INTAKE,
        plugged("acme-home", taken=False),
        "take it in first",
        lambda world, step: plugged("acme-home"),
    ),
    Case(
        "a bundle of another home",
        INTAKE,
        its_bundle("hospital-home"),
        "name the --home that issued the bundle",
        lambda world, step: its_bundle("acme-home"),
    ),
    Case(
        "a return for another home",
        INTAKE,
        PLUG.replace("{owner}", "{tuner}") + OUT,
        "name the --home that issued the bundle",
        then(PLUG + OUT),
    ),
    Case(
        "a base that changes meanwhile",
        "model_owner/base_model.py",
        meanwhile(True),
        "see to it that nobody writes to the base",
        lambda world, step: meanwhile(False),
    ),
    Case(
        "a bundle that a ledger cannot hold",
        LEDGER,
        PLUG + OUT,
        "use the version of offsite that issued the bundle",
        backup,
        rewritten("UPDATE bundles SET manifest = ?", lambda world: b"{}"),
    ),
    Case(
        "a return in the ledger's place of a bundle",
        LEDGER,
        PLUG + OUT,
        "restore the ledger from a backup",
        backup,
        rewritten("UPDATE bundles SET manifest = ?", lambda world: (world.folder / "return" / MANIFEST).read_bytes()),
        "another kind of document",
    ),
    Case(
        "a ledger that is no database",
        LEDGER,
        PLUG + OUT,
        "check that the home is writable and has space",
        backup,
        no_database,
    ),
    Case("a lost map", CARRY, OTHER + OUT, "restore the ledger of the home", backup, adapted_everywhere, "has no map"),
    Case(
        "a map of another bundle",
        CARRY,
        PLUG + OUT,
        "restore the ledger of the home",
        backup,
        rewritten("UPDATE bundles SET carry = ?", other_map),
        "does not lead",
    ),
    Case(
        "a classifier as an adapter",
        FORM,
        f"{PICTURED}{OUT} --as adapter",
        "plug it in with --as merged",
        then(f"{PICTURED}{OUT} --as merged"),
        and_pictures(),
        "a return with a classifier",
    ),
    Case(
        "merged bottlenecks",
        FORM,
        f"{OTHER}{OUT} --as merged",
        "plug it in with --as adapter",
        then(f"{OTHER}{OUT} --as adapter"),
        returned(bottleneck_return),
    ),
    Case(
        "a choice for pictures",
        CHOOSE,
        f"{PICTURED}{OUT} --choose-on {{folder}}/rows.jsonl",
        "plug in with --strength",
        then(f"{PICTURED}{OUT} --strength 0.5"),
        and_pictures(),
    ),
    Case(
        "a return that makes it worse",
        CHOOSE,
        f"{OTHER}{OUT} --choose-on {{folder}}/rows.jsonl",
        "to plug it in all the same, give --strength",
        then(f"{OTHER}{OUT} --strength 1"),
        tuned_the_other_way,
    ),
    Case(
        "a tensor of no block",
        TENSORS,
        named("model.norm.weight"),
        "ask the data owner for another return",
        lambda world, step: named("model.layers.0.mlp.up_proj.weight"),
    ),
    Case(
        "an adapter that overflows",
        TENSORS,
        f"{OTHER}{OUT} --strength 1.5",
        "plug in with a lower --strength; nothing",
        then(f"{OTHER}{OUT} --strength 1"),
        almost_too_large,
    ),
    Case(
        "values that overflow",
        TENSORS,
        f"{OTHER.replace('/base', '/half')}{OUT}",
        "plug in with a lower --strength, or",
        then(f"{OTHER.replace('/base', '/half')}{OUT} --strength 0.5"),
        twice,
    ),
    Case(
        "another whole checkpoint",
        "model_owner/plugging_in/whole_checkpoint.py",
        whole(),
        "that `offsite import` was given for this base",
        the_right_one,
        tower(another_checkpoint),
    ),
    Case(
        "a damaged record of an import",
        "model_owner/importing/import_record.py",
        whole(),
        "import the model again",
        imported_again,
        tower(lambda place: (place / "base" / RECORD).write_text("{")),
    ),
)
