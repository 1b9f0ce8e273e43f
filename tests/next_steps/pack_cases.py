"""Steps of errors of `offsite pack`: bases, settings that do not go together, calibration and healing."""

import importlib.util
import re
import shutil
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaModel

from artifacts import edit_weights
from model_owner.test_nearest_settings import applied
from next_steps.owner_cases import PARTITION
from next_steps.picture_cases import and_pictures
from next_steps.world import OUT, PACK, Case, Command, Mend, Spoil, World, edited, kept, restored, then
from offsite.cli import main
from offsite.config import PackSpec
from offsite.model_owner import block_runner, prove_family
from offsite.model_owner.base_model import open_base
from offsite.model_owner.check_packing import require_packable
from offsite.model_owner.heal import middle_states
from offsite.model_owner.heal.unsolvable import explain_unsolvable
from offsite.model_owner.narrow import even_widths
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS
from tiny import tiny_base, tiny_vision_base
from tiny_types import tiny_type_base

BASE, SETTINGS = "model_owner/base_model.py", "model_owner/bundle_settings.py"
WIDTHS, PICTURES = "model_owner/narrow/even_widths.py", "model_owner/calibration/calibration_pictures.py"
RUNNER, PROOF = "model_owner/block_runner.py", "model_owner/prove_family.py"
CHANGED = f"{PACK.replace('/base', '/changed')}{OUT}"
PICTURED = f"{PACK.replace('/base', '/encoder')}{OUT}"
CONFIGURED = f"{PACK}{OUT} --config {{folder}}/s.toml"
REFIT = f"{PACK.replace('--top 1', '--top 0').replace('--heal none', '--heal refit')}"
CONTIGUOUS = f"{PACK.replace('--top 1', '--top 0')} --select contiguous"
DISTILL = f"{REFIT.replace('refit', 'distill')} --distill-tokens 600{OUT}"
PICTURED_REFIT = f"{REFIT.replace('/base', '/encoder')}{OUT}"
EVERY = {"placement": "every", "heal": "none"}


def spoiled(family: str, change: Callable[[Path], object], **settings: Any) -> Spoil:
    """A base of a family with a fault; "right" is without it."""

    def make(world: World) -> None:
        tiny_base(world.folder / "right", family, 3, **settings)  # type: ignore[arg-type]
        shutil.copytree(world.folder / "right", world.folder / "changed")
        change(world.folder / "changed")

    return make


def derived(model_type: str, change: Callable[[World], object] = lambda world: None) -> Spoil:
    """A base of a type without a row in the table; "right" is without a fault."""

    def make(world: World) -> None:
        tiny_type_base(world.folder / "right", model_type, 3)
        shutil.copytree(world.folder / "right", world.folder / "changed")
        change(world)

    return make


def published_again(world: World, step: str) -> None:
    shutil.rmtree(world.folder / "changed")
    shutil.copytree(world.folder / "right", world.folder / "changed")


def imported_again(world: World, step: str) -> str:
    assert "`offsite import MODEL --out base/`" in step
    restored(world, step)
    assert main(world.words("import {folder}/base --out {folder}/again")) == 0
    return f"{PACK.replace('/base', '/again')}{OUT}"


def doubled(folder: Path) -> None:
    edit_weights(folder / WEIGHTS, lambda held: held.update({"wte.weight": held["transformer.wte.weight"]}))


def other_head(folder: Path) -> None:
    edit_weights(folder / WEIGHTS, lambda held: held.update({"lm_head.weight": 2 * held["model.embed_tokens.weight"]}))


def largest(world: World) -> None:
    """One weight that is finite in fp32 alone, on a feature that goes nowhere."""

    def enlarge(held: dict[str, Any]) -> None:
        held["model.layers.1.post_attention_layernorm.weight"][0] = 1e-3
        held["model.layers.1.mlp.up_proj.weight"][0, 0] = np.finfo(np.float32).max
        held["model.layers.1.mlp.down_proj.weight"][:, 0] = 0

    spoiled("llama", lambda folder: edit_weights(folder / WEIGHTS, enlarge))(world)


def huge(folder: Path) -> None:
    edit_weights(folder / WEIGHTS, lambda held: held["model.norm.weight"].fill(1e38))


def settings(text: str) -> Spoil:
    return lambda world: settings_in(world.folder, text)


def settings_in(folder: Path, text: str) -> None:
    (folder / "s.toml").write_text(f"[pack]\n{text}\n")


def content(name: str, text: str) -> Spoil:
    def write(world: World) -> None:
        kept(name)(world)
        (world.folder / "base" / name).write_text(text)

    return write


def without_photos(installed: bool) -> Spoil:
    """As if scikit-image was not installed, or came without its photos."""

    def hide(world: World) -> None:
        find = importlib.util.find_spec
        spec = ModuleSpec("skimage", None, is_package=True) if installed else None
        if spec is not None:
            spec.submodule_search_locations = [str(world.folder)]
        world.patch.setattr(
            importlib.util, "find_spec", lambda name, *by: spec if name == "skimage" else find(name, *by)
        )

    return hide


def own_pictures(world: World, step: str) -> str:
    assert "name a folder of your own pictures" in step
    return f"{PICTURED_REFIT} --calibration {{folder}}/pictures"


def enough_tokens(world: World, step: str) -> None:
    least = re.search(r"to at least (\d+)", step)
    assert least
    settings(f"calibration_tokens = {least[1]}")(world)


def freed(world: World, step: str) -> str:
    assert "the same command with --resume" in step
    world.patch.undo()
    return f"{DISTILL} --resume"


def solved(sign: float) -> Command:
    def run(world: World) -> None:
        with explain_unsolvable(1):
            torch.linalg.cholesky(sign * torch.eye(3))

    return run


def silent_body(world: World) -> None:
    """As of a model that calls its blocks in another way than one after another."""
    world.patch.setattr(LlamaModel, "forward", lambda self, **inputs: None)


def silent_stack(world: World) -> None:
    """As of a model whose blocks, put together, are not called."""
    world.patch.setattr(block_runner.LoadedStack, "_body", property(lambda self: lambda **inputs: None))


def nothing_may_go(world: World) -> None:
    """As of a family whose blocks have no part that may become narrower."""
    whole = dict.fromkeys(("heads", "neurons", "experts"), "it is one piece")
    world.patch.setattr(even_widths, "obstacles", lambda *_: whole)


def unpatched(world: World, step: str) -> str:
    """Another model, which is as the first one without what was changed in it."""
    world.patch.undo()
    return f"{REFIT}{OUT}"


def packable(family: str, blocks: int = 3, **asked: Any) -> Command:
    """Check settings of packing on a base of a family, without packing."""

    def run(world: World) -> None:
        folder = world.folder / family
        if not folder.exists():
            make = {"vit": tiny_vision_base, "olmo2": tiny_type_base}.get(family, tiny_base)
            make(folder, family, blocks)  # type: ignore[operator]
        require_packable(open_base(Base(folder)), PackSpec.model_validate(asked))

    return run


def as_it_says(family: str, **asked: Any) -> Mend:
    """The settings as the step changes them: flags that it gives, and without those that it leaves out."""

    def follow(world: World, step: str) -> Command:
        left = applied(asked, step)
        assert left != asked, step
        return packable(family, **left)

    return follow


def at_least(world: World, step: str) -> Command:
    share = re.search(r"--narrow-experts ([\d.]+) or more", step)
    assert share
    return packable("mixtral", **EVERY, narrow_experts=float(share[1]))


def nearest(name: str, file: str, family: str, says: str, what: str = "", **asked: Any) -> Case:
    """A case of settings, of which the error says which to leave out or to change."""
    return Case(name, file, packable(family, **asked), says, as_it_says(family, **asked), what=what)


def instead(
    name: str, file: str, family: str, says: str, asked: dict[str, Any], then_asked: dict[str, Any], what: str = ""
) -> Case:
    """A case of settings, of which the step says in words what to choose."""
    return Case(
        name, file, packable(family, **asked), says, lambda world, step: packable(family, **then_asked), what=what
    )


ENDS = {"bottom": 1, "top": 0, "keep": 1, "heal": "none"}
CASES = (
    Case(
        "a tensor under two names",
        BASE,
        CHANGED,
        "import the model again from where",
        published_again,
        spoiled("gpt2", doubled),
    ),
    Case(
        "another head than the embedding",
        BASE,
        CHANGED,
        "set tie_word_embeddings to false",
        lambda world, step: edited("changed/config.json", tie_word_embeddings=False)(world),
        spoiled("llama", other_head),
    ),
    Case(
        "a base's config that is no JSON",
        BASE,
        PACK + OUT,
        "import the model again with",
        imported_again,
        content("config.json", "{"),
        "cannot read",
    ),
    Case(
        "a base's config that is a list",
        BASE,
        PACK + OUT,
        "import the model again with",
        imported_again,
        content("config.json", "[]"),
        "is not a JSON object",
    ),
    Case(
        "blocks that are not reached",
        RUNNER,
        f"{REFIT}{OUT}",
        "choose a model of another type",
        unpatched,
        silent_body,
        "with the hidden state",
    ),
    Case(
        "blocks out of order",
        RUNNER,
        DISTILL,
        "choose a model of another type",
        unpatched,
        silent_stack,
        "in order",
    ),
    Case(
        "a config that may not travel",
        SETTINGS,
        PACK + OUT,
        "correct ",
        lambda world, step: edited("base/config.json", hidden_act="silu")(world),
        edited("base/config.json", hidden_act="../silu"),
        "the base's config has content",
    ),
    Case(
        "no file of the image processor",
        SETTINGS,
        PICTURED,
        "copy the image processor's file",
        lambda world, step: (
            shutil.copy(world.folder / "p.json", world.folder / "encoder" / "preprocessor_config.json") and None
        ),
        and_pictures(
            lambda world: shutil.move(world.folder / "encoder" / "preprocessor_config.json", world.folder / "p.json")
        ),
    ),
    Case(
        "a tokenizer's settings that are no JSON",
        SETTINGS,
        PACK + OUT,
        "correct the file in the base",
        restored,
        content("tokenizer_config.json", "{"),
        "is not JSON",
    ),
    Case(
        "a tokenizer's class out of code",
        SETTINGS,
        PACK + OUT,
        "correct the file in the base",
        restored,
        content("tokenizer_config.json", '{"tokenizer_class": "a.b"}'),
        "has content that may not travel",
    ),
    Case(
        "no method that could train",
        "model_owner/bundle_tensors.py",
        CONFIGURED,
        "permit another method",
        lambda world, step: settings('methods = ["lora"]')(world) and None,
        settings('methods = ["bitfit"]'),
    ),
    Case(
        "no photos",
        PICTURES,
        PICTURED_REFIT,
        "[calibration-images]",
        own_pictures,
        and_pictures(without_photos(False)),
        "are not installed",
    ),
    Case(
        "a package without its photos",
        PICTURES,
        PICTURED_REFIT,
        "with --calibration",
        own_pictures,
        and_pictures(without_photos(True)),
        "does not hold the photos",
    ),
    Case(
        "less text than one sequence",
        "model_owner/calibration/calibration_text.py",
        f"{REFIT.replace('/base', '/changed')}{OUT} --config {{folder}}/s.toml",
        "set calibration_tokens",
        enough_tokens,
        spoiled(
            "llama", lambda folder: settings_in(folder.parent, "calibration_tokens = 256"), max_position_embeddings=2048
        ),
    ),
    Case(
        "a loss that is not finite",
        "model_owner/check_bundle.py",
        CHANGED,
        "import the model again",
        published_again,
        spoiled("llama", huge),
    ),
    Case(
        "weights that packing makes infinite",
        "model_owner/pack.py",
        f"{PACK.replace('/base', '/changed')} --dtype bf16{OUT}",
        "or with --dtype fp32",
        then(f"{PACK.replace('/base', '/changed')} --dtype fp32{OUT}"),
        largest,
    ),
    Case(
        "no room for hidden states",
        "model_owner/heal/middle_states.py",
        DISTILL,
        "free some space on that disk",
        freed,
        lambda world: world.patch.setattr(middle_states.shutil, "disk_usage", lambda place: SimpleNamespace(free=10)),
    ),
    Case(
        "equations without a solution",
        "model_owner/heal/unsolvable.py",
        solved(-1.0),
        "check the base's weights",
        lambda world, step: solved(1.0),
    ),
    Case(
        "logits that depend on no token",
        PROOF,
        CHANGED,
        "check the weights",
        published_again,
        derived(
            "olmo2",
            lambda world: edit_weights(world.folder / "changed" / WEIGHTS, lambda held: held["lm_head.weight"].fill(0)),
        ),
    ),
    Case(
        "a bundle that computes something else",
        PROOF,
        CHANGED,
        "use a model of another type",
        then(PACK + OUT),
        derived("olmo2", lambda world: world.patch.setitem(prove_family._TOLERANCE, torch.float32, -1.0)),
        "would not compute",
    ),
    Case(
        "a model of which no block can be dropped",
        PROOF,
        CHANGED,
        "use a model of another type",
        then(PACK + OUT),
        derived(
            "olmo2",
            lambda world: world.patch.setattr(prove_family, "loading_problems", lambda info, family: ["missing x"]),
        ),
        "cannot be packed",
    ),
    Case(
        "a run that is not in the middle",
        "model_owner/select/contiguous.py",
        f"{CONTIGUOUS} --drop-from 9{OUT}",
        "choose --drop-from between",
        then(f"{CONTIGUOUS} --drop-from 1{OUT}"),
    ),
    nearest("4 bits of a derived type", "model_owner/compress/declare_emulator.py", "olmo2", "", **ENDS, bits=4),
    instead(
        "narrow MLPs of two maps in one",
        "model_owner/compress/mlp_width.py",
        "phi3",
        "leave mlp_width out",
        {**ENDS, "mlp_width": 0.5},
        ENDS,
    ),
    nearest("a share that removes nothing", WIDTHS, "llama", "choose a smaller share", **EVERY, narrow_neurons=0.99),
    Case(
        "blocks that cannot be narrowed",
        WIDTHS,
        packable("llama", **EVERY, narrow=0.5),
        "dropping blocks with --keep",
        as_it_says("llama", **EVERY, narrow=0.5),
        nothing_may_go,
    ),
    nearest(
        "experts of blocks that have none", WIDTHS, "llama", "leave --narrow-experts out", **EVERY, narrow_experts=0.5
    ),
    Case(
        "too few experts",
        WIDTHS,
        packable("mixtral", **EVERY, narrow_experts=0.25),
        "choose --narrow-experts ",
        at_least,
    ),
    instead(
        "too narrow", WIDTHS, "llama", "choose a larger share", {**EVERY, "narrow": 0.01}, {**EVERY, "narrow": 0.5}
    ),
    instead(
        "a head that is the embedding",
        PARTITION,
        "llama",
        "pack without --permit-head",
        {**ENDS, "permit_head": True},
        ENDS,
    ),
    instead(
        "healing of a derived type",
        PARTITION,
        "olmo2",
        "and with --keep or --prune-by magnitude",
        {**ENDS, "heal": "refit"},
        ENDS,
    ),
    instead(
        "nothing that would train",
        PARTITION,
        "llama",
        "choose --keep below",
        {"keep": 3, "heal": "none"},
        {"keep": 2, "heal": "none"},
    ),
    nearest(
        "healing between trained blocks",
        PARTITION,
        "gpt2",
        "or let train list first and last blocks alone",
        blocks=6,
        train="0,2,5",
        keep=2,
        heal="distill",
    ),
    nearest(
        "healing of pictures by words",
        PARTITION,
        "vit",
        "",
        what="that are for language models alone",
        **{**ENDS, "heal": "distill", "distill_ce": 1.0},
    ),
)
