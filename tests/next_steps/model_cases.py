"""Steps of errors about models: their config, their weights, their tokenizer, and adapters on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from artifacts import GONE, bottleneck_return, edit_json, full_return
from model_owner.importing.test_text_tower import whole_model
from next_steps.picture_cases import and_pictures
from next_steps.world import EVAL, OUT, PACK, Case, Command, Spoil, World, edited, kept, restored, then
from offsite.cli import main
from offsite.model_owner.base_model import open_base
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.models import tokenizers
from offsite.models.backbone import split_backbone_and_head
from offsite.models.families import derive_family
from offsite.models.image_encoder import encoder_of
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.protocol.manifest import MANIFEST, SIGNATURE
from offsite.protocol.verify import verify_bundle
from tiny import tiny_base, tiny_vision_base
from tiny_types import shrunk

FAMILY, LANGUAGE = "models/families/family.py", "models/families/language_families.py"
ARCHITECTURES, DERIVED = "models/families/architectures.py", "models/families/derive_family.py"
ADAPTED, FOLDER, LOADING = "models/adapted.py", "models/model_folder.py", "models/loading.py"
PLAN = f"{PACK.replace('/base', '/changed')}{OUT} --plan"
ALONE = "eval {folder}/alone --data {folder}/rows.jsonl"
ON_OTHER = "eval {folder}/other --data {folder}/rows.jsonl --adapter {folder}/adapter"
ON_BUNDLE = "eval {folder}/bundle --data {folder}/rows.jsonl --adapter {folder}/adapter --home {tuner}"
CORRECT = "correct config.json in the base folder"
MIXTURE = "qwen2_moe"


def changed(family: str, **settings: Any) -> Spoil:
    """A base of a family with other settings in its config, and the config as it was."""

    def make(world: World) -> None:
        tiny_base(world.folder / "changed", family, 3)  # type: ignore[arg-type]
        shutil.copy(world.folder / "changed" / "config.json", world.folder / "right.json")
        edit_json(world.folder / "changed" / "config.json", **settings)

    return make


def corrected(world: World, step: str) -> None:
    shutil.copy(world.folder / "right.json", world.folder / "changed" / "config.json")


def of_timm(world: World) -> None:
    tiny_vision_base(world.folder / "changed", "timm, eva", 3)
    shutil.copy(world.folder / "changed" / "config.json", world.folder / "right.json")
    edit_json(world.folder / "changed" / "config.json", intermediate_size=50)


def opened(name: str) -> Command:
    return lambda world: open_base(Base(world.folder / name))


def counted(name: str) -> Command:
    return lambda world: base_widths(open_base(Base(world.folder / name)), 0)


def lost_in_derivation(world: World) -> None:
    """As where a library fails on a config."""
    changed("llama", model_type="olmo2")(world)

    def fails(*_: object) -> None:
        raise AttributeError("no such part")

    world.patch.setattr(derive_family, "_derive", fails)


def taken_out(world: World, step: str) -> str:
    assert main(world.words("import {folder}/changed --out {folder}/again")) == 0
    return f"{PACK.replace('/base', '/again')}{OUT} --plan"


def cut(*kept: int) -> Command:
    def subset(world: World) -> None:
        derived = derive_family.derive_family(shrunk("diffllama", 4))
        derived.family.subset(derived.config, list(kept))

    return subset


def encoder(name: str) -> Command:
    return lambda world: encoder_of(load_model(world.folder / name, dtype=torch.float32, device=torch.device("cpu")))


def split(change: Callable[[Any], None] = lambda model: None) -> Command:
    """Split a model into body and head, after a change of the model."""

    def run(world: World) -> None:
        model = load_model(world.folder / "base", dtype=torch.float32, device=torch.device("cpu"))
        change(model)
        split_backbone_and_head(model)

    return run


def head_aside(model: Any) -> None:
    """As of a model that computes its logits by something else than its head."""
    aside = nn.Linear(32, model.config.vocab_size, bias=False)
    model.get_output_embeddings = lambda: aside


def bent_logits(model: Any) -> None:
    forward = model.forward

    def bent(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits.sin()
        return output

    model.forward = bent


def alone(name: str, *flags: str) -> Callable[[Callable[[Path], object]], Spoil]:
    """A bundle without its signature, as a plain folder, to spoil; `right` is as it was."""

    def of(change: Callable[[Path], object]) -> Spoil:
        def make(world: World) -> None:
            words = f"pack {{folder}}/base --for hospital --home {{owner}} {' '.join(flags)} --out {{folder}}/alone"
            assert main(world.words(words)) == 0
            for file in (MANIFEST, SIGNATURE):
                (world.folder / "alone" / file).unlink()
            shutil.copytree(world.folder / "alone", world.folder / "right")
            change(world.folder / "alone")

        return make

    return of


PLAIN = alone("plain", "--bottom 1 --top 1 --keep 1 --heal none")
STORED = alone("stored", "--bottom 1 --top 1 --heal none --bits 4")


def asked_again(world: World, step: str) -> None:
    shutil.rmtree(world.folder / "alone")
    shutil.copytree(world.folder / "right", world.folder / "alone")


def without_a_tensor(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))]
    save_file(tensors, file, {"format": "pt"})


def other_type(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"olmo2"'))


def no_declaration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{key: [] for key, value in config.items() if isinstance(value, dict)})


def adapter(make: Callable[..., object] | None = None, change: Callable[[Path], object] = lambda folder: None) -> Spoil:
    """A return without its signature, as a plain adapter, and another base that it does not fit."""

    def write(world: World) -> None:
        tiny_base(world.folder / "other", blocks=3, kv_heads=4)
        folder = world.folder / "adapter"
        if make is None:
            shutil.copytree(world.folder / "return", folder)
        else:
            make(verify_bundle(world.folder / "bundle", world.parties.data_owner), folder, world.parties.data_owner)
        for file in (MANIFEST, SIGNATURE):
            (folder / file).unlink()
        change(folder)

    return write


def plain_lora(world: World, step: str) -> None:
    edit_json(world.folder / "adapter" / "adapter_config.json", peft_type="LORA")


def no_package(world: World) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.folder / "base" / name).unlink()
    (world.folder / "base" / "tokenizer.model").write_bytes(b"\n\x05<unk>")
    world.patch.setattr(tokenizers, "_is_installed", lambda module: False)


def installed(world: World, step: str) -> None:
    assert step == "pip install sentencepiece protobuf"
    world.patch.setattr(tokenizers, "_is_installed", lambda module: True)


def tokenizer_package(world: World) -> None:
    tokenizers.require_tokenizer_package(world.folder / "base")


def no_end(world: World) -> None:
    edited("base/tokenizer_config.json", eos_token=GONE)(world)
    (world.folder / "base" / "special_tokens_map.json").unlink(missing_ok=True)


def written(text: str) -> Spoil:
    def write(world: World) -> None:
        kept("config.json")(world)
        (world.folder / "base" / "config.json").write_text(text)

    return write


OTHER_TYPE = "use a model of another type"
SAME = then(PACK + OUT)
CASES = (
    Case(
        "no number of blocks",
        FAMILY,
        PLAN,
        CORRECT,
        corrected,
        changed("llama", num_hidden_layers=GONE),
        "how many blocks the model has",
    ),
    Case("no number of experts", FAMILY, PLAN, CORRECT, corrected, changed(MIXTURE, num_experts="many"), "a block has"),
    Case(
        "a list that is too short",
        FAMILY,
        PLAN,
        CORRECT,
        corrected,
        changed("qwen2", layer_types=["full_attention"]),
        "has not one entry",
    ),
    Case(
        "more experts for a token than there are",
        FAMILY,
        PLAN,
        CORRECT,
        corrected,
        changed(MIXTURE, num_experts_per_tok=99),
        "how many experts a token",
    ),
    Case(
        "no period of windows",
        LANGUAGE,
        PLAN,
        CORRECT,
        corrected,
        changed("gemma3_text", layer_types=GONE, sliding_window_pattern=0),
        "sliding windows",
    ),
    Case(
        "no period of experts",
        LANGUAGE,
        PLAN,
        CORRECT,
        corrected,
        changed(MIXTURE, decoder_sparse_step=0),
        "which blocks have experts",
    ),
    Case(
        "heads that cannot be counted",
        "models/block_widths.py",
        counted("changed"),
        CORRECT,
        corrected,
        changed("gpt2", n_head=5),
    ),
    Case(
        "blocks that cannot be cut",
        ARCHITECTURES,
        PLAN,
        "use a checkpoint without that setting",
        corrected,
        changed("gpt2", scale_attn_by_inverse_layer_idx=True),
    ),
    Case(
        "sizes that do not follow from others",
        ARCHITECTURES,
        opened("changed"),
        "import the model again",
        corrected,
        of_timm,
    ),
    Case(
        "a type that transformers does not know",
        DERIVED,
        PLAN,
        OTHER_TYPE,
        SAME,
        changed("llama", model_type="no_such_type"),
        "are not supported",
    ),
    Case(
        "a language model within another",
        DERIVED,
        PLAN,
        "take the language model out with `offsite import",
        taken_out,
        lambda world: whole_model(world.folder / "changed", "llava"),
    ),
    Case(
        "blocks that no config gives",
        "models/families/cut_config.py",
        cut(0, 2, 3),
        "keep other blocks",
        lambda world, step: cut(0, 1),
    ),
    Case(
        "no encoder of images",
        "models/image_encoder.py",
        encoder("base"),
        "name an image encoder",
        lambda world, step: encoder("encoder"),
        and_pictures(),
    ),
    Case(
        "a head that is not called",
        "models/backbone.py",
        split(head_aside),
        "choose a model of another type",
        lambda world, step: split(),
    ),
    Case("logits that are bent", "models/backbone.py", split(bent_logits), OTHER_TYPE, lambda world, step: split()),
    Case(
        "a checkpoint without a tensor",
        LOADING,
        ALONE,
        "fetch the checkpoint again",
        asked_again,
        PLAIN(without_a_tensor),
    ),
    Case(
        "a stored form without a tensor",
        LOADING,
        ALONE,
        "ask the party that it came from",
        asked_again,
        STORED(without_a_tensor),
        what="are not those of its config",
    ),
    Case("a stored form of another type", ARCHITECTURES, ALONE, OTHER_TYPE, asked_again, STORED(other_type)),
    Case(
        "a stored form that is not declared",
        FOLDER,
        ALONE,
        "ask the party that it came from",
        asked_again,
        STORED(no_declaration),
    ),
    Case("a config that is no JSON", FOLDER, EVAL, "fetch the file again", restored, written("{"), "cannot read"),
    Case(
        "a config that is a list", FOLDER, EVAL, "fetch the file again", restored, written("[]"), "is not a JSON object"
    ),
    Case(
        "an unknown activation",
        "models/hugging_face_calls.py",
        EVAL,
        "check that the folder is complete",
        lambda world, step: edited("base/config.json", hidden_act="silu")(world),
        edited("base/config.json", hidden_act="nothing"),
    ),
    Case(
        "a tokenizer without an end",
        "models/tokenizers.py",
        EVAL,
        "name one as",
        lambda world, step: edited("base/tokenizer_config.json", eos_token="</s>")(world),
        no_end,
    ),
    Case(
        "a tokenizer without its package",
        "models/tokenizers.py",
        tokenizer_package,
        "pip install",
        installed,
        no_package,
    ),
    Case("an adapter of another model", ADAPTED, ON_OTHER, "that the adapter was made for", then(ON_BUNDLE), adapter()),
    Case(
        "tensors of another model", ADAPTED, ON_OTHER, "that they were tuned on", then(ON_BUNDLE), adapter(full_return)
    ),
    Case(
        "bottlenecks of another model",
        ADAPTED,
        ON_OTHER.replace("/other", "/small"),
        "that they were made for",
        then(ON_BUNDLE),
        adapter(bottleneck_return, lambda folder: tiny_base(folder.parent / "small", "llama", 2)),
    ),
    Case(
        "no adapter",
        ADAPTED,
        ON_BUNDLE.replace("/adapter", "/bundle/nothing"),
        "name a return of a LoRA tuning",
        then(ON_BUNDLE),
        adapter(),
    ),
    Case(
        "an adapter of another kind",
        ADAPTED,
        ON_BUNDLE,
        "save the adapter as a plain LoRA",
        plain_lora,
        adapter(None, lambda folder: edit_json(folder / "adapter_config.json", peft_type="IA3")),
    ),
)
