"""Steps of errors that the model's owner meets: packing, plugging in, keys."""

import shutil

from artifacts import full_return
from next_steps.world import OUT, PACK, PLUG, Case, World, as_advised, edited, file, kept, restored, runs, then
from offsite.cli import main
from offsite.model_owner.heal.heal_steps import RECORD
from offsite.model_owner.heal.hidden_states import FinishedBlock, StatesFolder
from offsite.protocol.verify import verify_bundle
from offsite.training.run_log import run_folder
from tiny import tiny_base, tiny_tokenizer

PARTITION, HOME, CHECK = "model_owner/partition.py", "protocol/home.py", "model_owner/plugging_in/check_plug_in.py"
REFIT = f"{PACK.replace('--top 1', '--top 0').replace('--heal none', '--heal refit')}{OUT} --config {{folder}}/s.toml"
HEAL = "pack {folder}/base --for hospital --home {owner} --bottom 1 --top 1"


def without_tokenizer(world: World) -> None:
    for path in (world.folder / "base").glob("*token*"):
        path.unlink()


def tokenizer_copied(world: World, step: str) -> None:
    tiny_tokenizer(world.folder / "base")


def taken_in(world: World) -> None:
    assert main(world.words(f"{PLUG} --out {{folder}}/first")) == 0


def full(world: World) -> None:
    bundle = verify_bundle(world.folder / "bundle", world.parties.data_owner)
    full_return(bundle, world.folder / "full", world.parties.data_owner, change=lambda name, shipped: shipped + 0.125)


def other_base(world: World) -> None:
    tiny_base(world.folder / "other", blocks=3, seed=1)


def other_key(world: World) -> None:
    words = "keygen --name other --home {folder}/other-home --out {folder}/other.pub"
    assert main(world.words(words)) == 0


def same_key(world: World) -> None:
    assert main(world.words("keygen --home {tuner} --out {folder}/hospital.pub")) == 0


def own_key(world: World) -> None:
    assert main(world.words("keygen --home {owner} --out {folder}/own.pub")) == 0
    same_key(world)


def distrusted_first(world: World, step: str) -> None:
    assert main(world.words(as_advised(world, step))) == 0


def damaged(world: World) -> None:
    shutil.copy(world.folder / "acme-home" / "key.pem", world.folder / "backup.pem")
    (world.folder / "acme-home" / "key.pem").write_text("-----BEGIN")


def backup(world: World, step: str) -> None:
    shutil.copy(world.folder / "backup.pem", world.folder / "acme-home" / "key.pem")


def interrupted(world: World) -> None:
    """A packing that was interrupted after its first block, and whose resume point then lost its end."""
    file("s.toml", "[pack]\ncalibration_tokens = 512\n")(world)
    save = StatesFolder.save

    def stop(folder: StatesFolder, point: FinishedBlock) -> None:
        save(folder, point)
        raise KeyboardInterrupt

    world.patch.setattr(StatesFolder, "save", stop)
    assert main(world.words(REFIT)) == 130
    world.patch.undo()
    record = run_folder(world.folder / "out") / RECORD
    record.write_bytes(record.read_bytes()[:-2])


def removed(world: World, step: str) -> None:
    runs(world, step)
    assert not run_folder(world.folder / "out").exists()


def open_to_others(world: World) -> None:
    (world.folder / "acme-home" / "trusted").chmod(0o777)


def closed(world: World, step: str) -> None:
    """The command of the step, and a look at what it has the fingerprints compared with."""
    runs(world, step)
    assert "`offsite trust list`" in step
    assert main(world.words("trust list --home {owner}")) == 0


CASES = (
    Case(
        "a time to heal without distillation",
        "config/settings_file.py",
        f"{PACK}{OUT} --heal-minutes 1",
        "for the settings and their ranges",
        then(PACK + OUT),
    ),
    Case(
        "too many blocks to keep",
        PARTITION,
        PACK.replace("--keep 1", "--keep 5") + OUT,
        "choose --keep between 1 and",
        then(PACK + OUT),
    ),
    Case(
        "a block that there is not",
        PARTITION,
        f"pack {{folder}}/base --for hospital --home {{owner}} --train 7 --keep 1 --heal none{OUT}",
        "choose among 0 to",
        then(f"pack {{folder}}/base --for hospital --home {{owner}} --train 0 --keep 1 --heal none{OUT}"),
    ),
    Case(
        "healing of nothing",
        PARTITION,
        f"{HEAL} --heal refit --bits 4{OUT}",
        "say with --keep how many blocks stay",
        then(f"{HEAL} --heal none --bits 4{OUT}"),
    ),
    Case(
        "too little text to heal on",
        "model_owner/calibration/calibration_batches.py",
        f"{HEAL} --calibration {{folder}}/few.txt{OUT}",
        "give more text with --calibration",
        lambda world, step: file("few.txt", "many words, and more of them. " * 900)(world),
        file("few.txt", "a few words\n"),
    ),
    Case(
        "no tokenizer",
        "model_owner/bundle_settings.py",
        PACK + OUT,
        "copy the tokenizer's files into the base folder",
        tokenizer_copied,
        without_tokenizer,
    ),
    Case(
        "a config of another model",
        "model_owner/base_model.py",
        PACK + OUT,
        "check that config.json belongs to these weights",
        lambda world, step: edited("base/config.json", num_hidden_layers=3)(world),
        edited("base/config.json", num_hidden_layers=4),
    ),
    Case(
        "no weights in a base",
        "storage/checkpoint_folder.py",
        PACK + OUT,
        "turn other formats into a base folder",
        restored,
        kept("model.safetensors"),
    ),
    Case(
        "a second plug-in",
        "model_owner/ledger.py",
        PLUG + OUT,
        "say so with --again",
        then(f"{PLUG}{OUT} --again"),
        taken_in,
    ),
    Case(
        "a checkpoint that there is not",
        CHECK,
        f"{PLUG}{OUT} --checkpoint 5",
        "or leave it out for the last",
        then(PLUG + OUT),
    ),
    Case(
        "a full return as an adapter",
        CHECK,
        f"{PLUG.replace('/return', '/full')}{OUT} --as adapter",
        "plug it in with --as merged",
        then(f"{PLUG.replace('/return', '/full')}{OUT} --as merged"),
        full,
        what="holds the model's own tensors",
    ),
    Case(
        "another base",
        CHECK,
        PLUG.replace("/base", "/other") + OUT,
        "that `offsite pack` was given for this bundle",
        then(PLUG + OUT),
        other_base,
    ),
    Case(
        "a whole checkpoint that there is not",
        "model_owner/plugging_in/whole_checkpoint.py",
        f"{PLUG}{OUT} --whole {{folder}}/base",
        "plug in without --whole",
        then(PLUG + OUT),
    ),
    Case(
        "no public key",
        "cli/keys.py",
        "trust add other {folder}/other.pub --home {owner}",
        "name the file that the other party made",
        lambda world, step: other_key(world),
    ),
    Case(
        "another key of a party",
        HOME,
        "trust add hospital {folder}/other.pub --home {owner}",
        "if the key has changed for a good reason",
        distrusted_first,
        other_key,
    ),
    Case(
        "a second name of a party",
        HOME,
        "trust add clinic {folder}/hospital.pub --home {owner}",
        "for another name, `offsite trust remove",
        distrusted_first,
        same_key,
    ),
    Case(
        "the own key",
        HOME,
        "trust add other {folder}/own.pub --home {owner}",
        "add the key that the other party sent",
        then("trust add hospital {folder}/hospital.pub --home {owner}"),
        own_key,
    ),
    Case(
        "a name with spaces",
        HOME,
        "trust add 'a clinic' {folder}/other.pub --home {owner}",
        "choose such a name",
        then("trust add clinic {folder}/other.pub --home {owner}"),
        other_key,
    ),
    Case(
        "a home that others may write to",
        HOME,
        PACK + OUT,
        "compare the fingerprints",
        closed,
        open_to_others,
        "other users may write to",
    ),
    Case(
        "a damaged resume point of packing",
        "model_owner/heal/hidden_states.py",
        REFIT,
        "remove the run and start again",
        removed,
        interrupted,
        "the resume point in",
    ),
    Case(
        "a damaged key",
        HOME,
        PACK + OUT,
        "put it back from a backup",
        backup,
        damaged,
        what="is damaged",
    ),
)
