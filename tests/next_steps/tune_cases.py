"""Steps of errors of `offsite tune`: runs that were interrupted, memory, pictures, and what cannot train."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from next_steps.picture_cases import VISION_TUNE, and_pictures
from next_steps.world import EVAL, OUT, TUNE, Case, Command, Spoil, World, runs, then
from offsite.cli import main
from offsite.config import TuneSpec
from offsite.data_owner import feature_cache, tune
from offsite.data_owner.methods.trainable_parameters import require_exactly
from offsite.data_owner.text_task import TextTask
from offsite.kernels import peak_memory
from offsite.progress import Event
from offsite.protocol.home import Home
from offsite.protocol.verify import verify_bundle
from offsite.training.run_log import log_file, run_folder

RESUME = f"{TUNE}{OUT} --resume"
LATE = RESUME.replace("/bundle", "/top-bundle").replace("--max-steps 2", "--max-steps 4")  # its first blocks are frozen
SPEC = {"rank": 2, "batch_size": 4, "max_steps": 2}  # of TUNE
AGAIN, FILES = "remove the run and start again", "data_owner/returned_checkpoints.py"
ONE_STEP = f"{TUNE.replace('--max-steps 2', '--max-steps 1')}{OUT}"
CHECKPOINTS = "--checkpoints 3 --max-steps 6"


def stopped(
    bundle: str = "bundle", after: int = 1, spoiled: tuple[str, str] | None = None, **settings: object
) -> Spoil:
    """A run that was interrupted after some steps, in which a file then got other content (None: it is gone)."""

    def stop(event: Event) -> None:
        if event.stage == "tuning" and event.done == after:
            raise KeyboardInterrupt

    def make(world: World) -> None:
        if bundle == "top-bundle":
            late_bundle(world)
            settings["max_steps"] = 4
        spec, home, rows = TuneSpec(**{**SPEC, **settings}), world.parties.data_owner, world.folder / "rows.jsonl"
        held_out = rows if spec.points.report_scores else None
        verified = verify_bundle(world.folder / bundle, home)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(verified, rows, world.folder / "out", spec, home, eval_data=held_out, progress=stop)
        if spoiled is not None:
            file = run_folder(world.folder / "out") / spoiled[0]
            assert file.exists()
            file.write_text(spoiled[1]) if spoiled[1] else file.unlink()

    return make


def late_bundle(world: World) -> None:
    packed(world.folder / "base", world.folder / "top-bundle", world.parties, bottom=0, keep=2)


def removed(world: World, step: str) -> None:
    """The run's folder, by the command in the step."""
    runs(world, step)
    assert not run_folder(world.folder / "out").exists()


def losing_its_features(world: World) -> object:
    """A tuning whose stored features are cut short while it runs."""

    def cut(event: Event) -> None:
        if event.stage == "tuning" and event.done == 1:
            (run_folder(world.folder / "out") / "features.bin").write_bytes(b"")

    home = world.parties.data_owner
    bundle = verify_bundle(world.folder / "top-bundle", home)
    spec = TuneSpec(**{**SPEC, "max_steps": 4})
    return tune.tune(bundle, world.folder / "rows.jsonl", world.folder / "out", spec, home, progress=cut)


def calls_no_block(world: World) -> None:
    """As of a model whose blocks are not called one after another."""
    late_bundle(world)
    losses = feature_cache.label_losses

    def unnoticed(network: Any, batch: Any) -> Any:
        with contextlib.suppress(feature_cache._Reached):
            return losses(network, batch)

    world.patch.setattr(feature_cache, "label_losses", unnoticed)


def third_home(world: World) -> None:
    Home(world.folder / "clinic").create_identity("clinic")


def tuned_in(home: str) -> Command:
    """A tuning by the data owner's bundle, in a home."""

    def run(world: World) -> None:
        bundle = verify_bundle(world.folder / "bundle", world.parties.data_owner)
        tune.tune(
            bundle, world.folder / "rows.jsonl", world.folder / "out", TuneSpec(**SPEC), Home(world.folder / home)
        )

    return run


def other_tensors(more: int) -> Command:
    """What would train, compared with what the bundle's manifest lists for full tuning."""

    def compare(world: World) -> None:
        manifest = verify_bundle(world.folder / "bundle", world.parties.data_owner).manifest
        listed = manifest.own_tensors("full")
        tensors = {name: torch.zeros(entry.shape) for name, entry in listed.items()}
        require_exactly(dict(list(tensors.items())[: len(tensors) - more]), listed)

    return compare


def held_out_loss(loss: float) -> Spoil:
    return lambda world: world.patch.setattr(TextTask, "validate", lambda task, progress, stage: {"loss": loss})


def with_more_memory(world: World, step: str) -> str:
    size = step.split()[2]
    assert step.startswith("give --memory ")
    return f"{TUNE}{OUT} --memory {size}"


def one_class(world: World) -> None:
    shutil.rmtree(world.folder / "pictures" / "red")
    shutil.rmtree(world.folder / "pictures" / "blue")


def two_classes(world: World, step: str) -> None:
    shutil.copytree(world.folder / "pictures" / "green", world.folder / "pictures" / "other")


def long_class(world: World) -> None:
    (world.folder / "pictures" / "red").rename(world.folder / "pictures" / ("r" * 129))


def short_class(world: World, step: str) -> None:
    (world.folder / "pictures" / ("r" * 129)).rename(world.folder / "pictures" / ("r" * 128))


def settings(**values: object) -> Spoil:
    """A settings file for [tune] and [eval]."""
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return lambda world: (world.folder / "s.toml").write_text(f"[tune]\n{lines}[eval]\n{lines}")


def finished(world: World) -> None:
    assert main(world.words(f"{TUNE}{OUT}")) == 0


def finished_without_a_log(world: World) -> None:
    finished(world)
    log_file(world.folder / "out").unlink()


FINISHED, ELSEWHERE = "data_owner/finished_run.py", then(f"{TUNE} --out {{folder}}/again")
CASES = (
    Case(
        "a finished run without its log",
        FINISHED,
        RESUME,
        "put the run's log back next to it",
        ELSEWHERE,
        finished_without_a_log,
    ),
    Case("another run that is finished", FINISHED, f"{RESUME} --lr 0.01", "to tune again", ELSEWHERE, finished),
    Case(
        "checkpoints of pictures",
        "data_owner/check_permissions.py",
        f"{VISION_TUNE}{OUT} --checkpoints 2",
        "leave out --checkpoints",
        then(VISION_TUNE + OUT),
        and_pictures(),
    ),
    Case(
        "biases of blocks that have none",
        "data_owner/check_permissions.py",
        f"{TUNE.replace('--rank 2', '--method bitfit')}{OUT}",
        "tune by another method: the bundle permits",
        then(TUNE + OUT),
    ),
    Case(
        "a bundle for another home",
        "data_owner/check_tuning.py",
        tuned_in("clinic"),
        "name the recipient's home with --home",
        lambda world, step: tuned_in("hospital-home"),
        third_home,
    ),
    Case(
        "a model whose blocks are not called",
        "data_owner/feature_cache.py",
        LATE,
        "ask the model's owner for another bundle",
        then(TUNE + OUT),
        calls_no_block,
    ),
    Case(
        "a damaged decision",
        "data_owner/feature_cache.py",
        LATE,
        AGAIN,
        removed,
        stopped("top-bundle", spoiled=("features.json", "{")),
    ),
    Case(
        "features cut short",
        "data_owner/feature_file.py",
        losing_its_features,
        "run the same command again with --resume",
        then(LATE),
        late_bundle,
    ),
    Case(
        "too little memory",
        "data_owner/memory_budget.py",
        f"{TUNE}{OUT} --memory 1MiB",
        "give --memory ",
        with_more_memory,
    ),
    Case(
        "a damaged record of memory",
        "data_owner/memory_budget.py",
        f"{RESUME} --memory 64GiB",
        AGAIN,
        removed,
        stopped(spoiled=("memory.json", "{"), memory="64GiB"),
    ),
    Case(
        "memory that cannot be measured",
        "kernels/peak_memory.py",
        f"{TUNE}{OUT} --memory 64GiB",
        "in the place of --memory use --gradient-checkpointing",
        then(f"{TUNE}{OUT} --gradient-checkpointing"),
        lambda world: world.patch.setattr(peak_memory, "_RESET", Path("/nowhere/clear_refs")),
    ),
    Case(
        "a device that is not here",
        "kernels/runtime.py",
        f"{EVAL} --config {{folder}}/s.toml",
        "leave the setting device out",
        lambda world, step: settings()(world) and None,
        settings(device="cuda:63"),
    ),
    Case(
        "tensors that a manifest does not list",
        "data_owner/methods/trainable_parameters.py",
        other_tensors(1),
        "a bundle made by a current version",
        lambda world, step: other_tensors(0),
    ),
    Case(
        "a held-out loss without an end",
        FILES,
        f"{TUNE}{OUT} --report-scores --eval-data {{folder}}/rows.jsonl",
        "or without --report-scores",
        lambda world, step: removed(world, step) or TUNE + OUT,
        held_out_loss(float("inf")),
    ),
    Case(
        "a lost checkpoint",
        FILES,
        RESUME.replace("--max-steps 2", CHECKPOINTS),
        "put them back, or remove the run",
        removed,
        stopped(after=5, spoiled=("checkpoint-1.safetensors", ""), checkpoints=3, max_steps=6),
    ),
    Case(
        "damaged scores of a run",
        FILES,
        RESUME.replace("--max-steps 2", f"{CHECKPOINTS} --report-scores --eval-data {{folder}}/rows.jsonl"),
        AGAIN,
        removed,
        stopped(after=5, spoiled=("scores.json", "{"), checkpoints=3, max_steps=6, report_scores=True),
        what="cannot read",
    ),
    Case(
        "held-out pictures and a share of them",
        "data_owner/tuning_pictures.py",
        f"{VISION_TUNE}{OUT} --eval-data {{folder}}/pictures --config {{folder}}/s.toml",
        "give one of them",
        then(f"{VISION_TUNE}{OUT} --eval-data {{folder}}/pictures"),
        and_pictures(lambda world: (world.folder / "s.toml").write_text("[tune]\neval_share = 0.5\n")),
    ),
    Case(
        "pictures of one class",
        "data_owner/tuning_pictures.py",
        VISION_TUNE + OUT,
        "give pictures of at least two classes",
        two_classes,
        and_pictures(one_class),
    ),
    Case(
        "a class with a long name",
        "data_owner/tuning_pictures.py",
        VISION_TUNE + OUT,
        "names of at most 128 characters",
        short_class,
        and_pictures(long_class),
    ),
    Case(
        "weights that are not finite after the last step",
        "data_owner/write_return.py",
        f"{ONE_STEP} --lr 1e39",
        "tune again with a lower --lr",
        lambda world, step: removed(world, step) or f"{ONE_STEP} --lr 1e-3",
    ),
    Case(
        "a damaged resume point",
        "training/resume_points.py",
        RESUME,
        AGAIN,
        removed,
        stopped(spoiled=("state.json", "{}")),
        what="is damaged, or of an earlier version",
    ),
    Case(
        "a resume point that is no JSON",
        "training/run_identity.py",
        RESUME,
        AGAIN,
        removed,
        stopped(spoiled=("state.json", "{")),
        what="cannot read",
    ),
    Case(
        "features of a pooling that a family lacks",
        "models/image_encoder.py",
        f"{VISION_TUNE}{OUT} --config {{folder}}/s.toml",
        "leave the setting pooling out",
        then(VISION_TUNE + OUT),
        and_pictures(lambda world: (world.folder / "s.toml").write_text('[tune]\npooling = "both"\n')),
    ),
)
