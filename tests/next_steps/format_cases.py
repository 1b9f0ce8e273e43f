"""Steps of errors of `offsite import`: files of GGUF and ONNX, models of timm, and parts of multi-modal models."""

import builtins
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from artifacts import GONE
from gguf_files import as_gguf
from model_owner.importing.test_text_tower import whole_model
from model_owner.importing.test_timm import published
from next_steps.import_cases import CHANGED, LOCATE, named
from next_steps.world import IMPORT, OUT, Case, Mend, Spoil, World, as_advised, edited, program, runs, then
from offsite.config import ImportSpec
from offsite.model_owner.importing.import_model import import_model
from offsite.storage.checkpoint_folder import WEIGHTS
from onnx_files import exported, tiny_dinov2
from tiny import tiny_vision_base

GGUF, ONNX, TIMM = "model_owner/importing/gguf.py", "model_owner/importing/onnx.py", "model_owner/importing/timm.py"
TEXT, VISION = "model_owner/importing/text_tower.py", "model_owner/importing/vision_tower.py"
FILE, GRAPH, WHOLE = named("model.gguf"), named("model.onnx"), named("whole")
SOURCE = then(IMPORT)  # the safetensors that a file was made from


def gguf(
    name: str = "model.gguf", *, cut: int | None = None, kind: str = "", plain: bool = False, **written: Any
) -> Spoil:
    """A GGUF file of the base; with `plain`, and of another kind, also one without fault."""

    def write(world: World) -> None:
        file = world.folder / name
        file.parent.mkdir(exist_ok=True)
        if kind:
            as_other(file, kind, **written)
        else:
            as_gguf(world.folder / "base", file, **written)
        if cut:
            file.write_bytes(file.read_bytes()[:cut])
        if plain or kind:
            as_gguf(world.folder / "base", world.folder / "plain.gguf")

    return write


def as_other(file: Path, kind: str, architecture: str = "llama", parts: int = 1) -> None:
    """A GGUF file that holds no whole model of a language."""
    import gguf as package

    writer = package.GGUFWriter(str(file), architecture)
    writer.add_type(kind)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def nameless(world: World) -> None:
    gguf(plain=True)(world)
    file = world.folder / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"general.architecture", b"general.architectura"))


def unknown(world: World) -> None:
    gguf()(world)
    file = world.folder / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"grok1"))


def two_files(world: World) -> None:
    gguf("folder/a.gguf")(world)
    shutil.copy(world.folder / "folder" / "a.gguf", world.folder / "folder" / "b.gguf")


def joined(world: World, step: str) -> str:
    """What `llama-gguf-split` and `llama-export-lora` do, with a file that is whole."""
    script = "import shutil, sys\nassert sys.argv[1] == '--merge'\nshutil.copy('plain.gguf', sys.argv[3])\n"
    program(world, "llama-gguf-split", script)
    runs(world, step.replace("FIRST-FILE", "model.gguf"))
    return f"import {shlex.quote(shlex.split(step.split('`')[1])[-1])}{OUT}"


def downloaded(world: World, step: str) -> None:
    shutil.copy(world.folder / "plain.gguf", world.folder / "model.gguf")


def not_read(world: World) -> None:
    """As of a file with settings that this version of transformers does not know."""
    from transformers import AutoConfig

    gguf()(world)

    def refused(*_: object, **more: object) -> None:
        raise ValueError("GGUF model with architecture x is not supported yet")

    world.patch.setattr(AutoConfig, "from_pretrained", refused)


def from_safetensors(world: World, step: str) -> str:
    world.patch.undo()
    return IMPORT


@cache
def graph(heads: int = 1) -> bytes:
    """An ONNX file of a tiny DINOv2; with two heads another one computes than a file can say."""
    pytest.importorskip("onnx")
    with tempfile.TemporaryDirectory() as place:
        source = tiny_dinov2(Path(place) / "source", num_attention_heads=heads)
        return exported(source, Path(place) / "model.onnx").read_bytes()


def onnx(heads: int = 1, change: Callable[[Any], None] | None = None) -> Spoil:
    """An ONNX file, and the checkpoint that it was exported from."""

    def write(world: World) -> None:
        package = pytest.importorskip("onnx")
        tiny_dinov2(world.folder / "exported")
        (world.folder / "model.onnx").write_bytes(graph(heads))
        if change is not None:
            model = package.load(str(world.folder / "model.onnx"))
            change(model.graph)
            package.save(model, str(world.folder / "model.onnx"))

    return write


def more_weights(inner: Any) -> None:
    import onnx as package

    inner.initializer.append(package.numpy_helper.from_array(np.ones((4, 4), np.float32), "onnx::more"))
    inner.node.append(package.helper.make_node("Mul", ["x", "onnx::more"], ["z"], "/backbone/encoder/Mul"))


def noise(world: World) -> None:
    onnx()(world)
    (world.folder / "model.onnx").write_bytes(b"\xff" * 100)


def fetched(world: World, step: str) -> None:
    (world.folder / "model.onnx").write_bytes(graph())


def forbidden(world: World) -> None:
    onnx()(world)
    opened = builtins.open

    def refused(file: Any, *words: Any, **more: Any) -> Any:
        if str(file).endswith("model.onnx"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *words, **more)

    world.patch.setattr(builtins, "open", refused)


def permitted(world: World, step: str) -> None:
    world.patch.undo()


def imported(size: int) -> Callable[[World], object]:
    return lambda world: import_model(world.folder / "model.onnx", world.folder / "out", ImportSpec(image_size=size))


def of_timm(change: Callable[[World], object] = lambda world: None, **settings: object) -> Spoil:
    """A model as timm publishes it, and the same without fault."""

    def write(world: World) -> None:
        published(world.folder / "right")
        published(world.folder / "changed", **settings)
        change(world)

    return write


def other_weights(world: World) -> None:
    tensors = load_file(world.folder / "changed" / WEIGHTS)
    del tensors["pos_embed"]
    save_file(tensors, world.folder / "changed" / WEIGHTS, {"format": "pt"})


def as_published(name: str) -> Mend:
    """A file as it was published."""
    return lambda world, step: shutil.copy(world.folder / "right" / name, world.folder / "changed" / name) and None


def of_clip(change: Callable[[World], object]) -> Spoil:
    """A model of images and texts; "right" is without fault."""

    def write(world: World) -> None:
        from transformers import AutoConfig, AutoModel

        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        parts = {
            "vision_config": {**sizes, "image_size": 16, "patch_size": 4},
            "text_config": {**sizes, "vocab_size": 64},
        }
        AutoModel.from_config(AutoConfig.for_model("clip", **parts)).save_pretrained(world.folder / "right")
        tiny_vision_base(world.folder / "processor", "vit", 1)
        shutil.copy(world.folder / "processor" / "preprocessor_config.json", world.folder / "right")
        shutil.copytree(world.folder / "right", world.folder / "changed")
        change(world)

    return write


def of_llava(change: Callable[[World], object]) -> Spoil:
    """A multi-modal model; "right" is without fault."""

    def write(world: World) -> None:
        whole_model(world.folder / "right", "llava")
        shutil.copytree(world.folder / "right", world.folder / "changed")
        change(world)

    return write


def of_kosmos(world: World) -> None:
    from transformers import AutoConfig

    of_llava(lambda world: None)(world)
    config = AutoConfig.for_model("kosmos-2").to_dict()
    (world.folder / "changed" / "config.json").write_text(json.dumps(config, default=str))


CASES = (
    Case(
        "half a GGUF file",
        GGUF,
        FILE,
        "download the file again",
        downloaded,
        gguf(cut=3000, plain=True),
        "is not a complete GGUF file",
    ),
    Case("an adapter in GGUF", GGUF, FILE, "llama-export-lora", then(named("plain.gguf")), gguf(kind="adapter")),
    Case(
        "the part for pictures in GGUF",
        GGUF,
        FILE,
        "import the file with the language model",
        then(named("plain.gguf")),
        gguf(kind="mmproj", architecture="clip"),
    ),
    Case(
        "a GGUF file that is a part",
        GGUF,
        FILE,
        "llama-gguf-split --merge FIRST-FILE",
        joined,
        gguf(kind="model", parts=2),
    ),
    Case(
        "a GGUF file of no architecture",
        GGUF,
        FILE,
        "download the file again",
        downloaded,
        nameless,
        "does not name its architecture",
    ),
    Case(
        "a GGUF file of an unknown architecture",
        GGUF,
        FILE,
        "import the safetensors",
        SOURCE,
        unknown,
        "GGUF files of architecture",
    ),
    Case(
        "a GGUF file that transformers does not read",
        GGUF,
        FILE,
        "import the safetensors",
        from_safetensors,
        not_read,
        "transformers cannot read",
    ),
    Case(
        "a setting in GGUF that has no place",
        GGUF,
        FILE,
        "import the safetensors",
        SOURCE,
        gguf(more={"logit_scale": 0.5}),
        "has settings that would be lost",
    ),
    Case(
        "a tensor in GGUF that has no place",
        GGUF,
        FILE,
        "import the safetensors",
        SOURCE,
        gguf(tensors={"nextn.weight": np.ones(4)}),
        "has tensors that would be lost",
    ),
    Case(
        "two GGUF files",
        LOCATE,
        named("folder"),
        "name one of them: `offsite import",
        as_advised,
        two_files,
        "GGUF files, expected one",
    ),
    Case(
        "a part by its name",
        LOCATE,
        named("model-00001-of-00002.gguf"),
        "join them with llama.cpp's tool",
        joined,
        gguf("model-00001-of-00002.gguf", plain=True),
    ),
    Case(
        "a side that patches do not fill",
        ONNX,
        imported(30),
        "give image_size a multiple of",
        lambda world, step: imported(28),
        onnx(),
    ),
    Case("a graph that nobody may read", ONNX, GRAPH, "that you may read the file", permitted, forbidden),
    Case("a graph that is none", ONNX, GRAPH, "fetch the file again", fetched, noise),
    Case(
        "weights of a graph that have no place",
        ONNX,
        GRAPH,
        "import the checkpoint that was exported",
        then(named("exported")),
        onnx(change=more_weights),
    ),
    Case(
        "a graph of no encoder",
        ONNX,
        GRAPH,
        "in safetensors, .bin or GGUF",
        SOURCE,
        onnx(change=lambda inner: inner.ClearField("initializer")),
    ),
    Case(
        "a graph that computes something else",
        "model_owner/importing/compare_onnx.py",
        GRAPH,
        "import the checkpoint that was exported",
        then(named("exported")),
        onnx(heads=2),
    ),
    Case(
        "another model of timm",
        TIMM,
        CHANGED,
        "use one of these",
        then(named("right")),
        of_timm(edited("changed/config.json", architecture="resnet50")),
    ),
    Case(
        "other weights of timm", TIMM, CHANGED, "fetch the model again", as_published(WEIGHTS), of_timm(other_weights)
    ),
    Case(
        "another preprocessing of timm",
        TIMM,
        CHANGED,
        "correct pretrained_cfg",
        as_published("config.json"),
        of_timm(crop_mode="squash"),
    ),
    Case(
        "a tower that is not described",
        VISION,
        CHANGED,
        "import the model again",
        as_published("config.json"),
        of_clip(edited("changed/config.json", vision_config=GONE)),
    ),
    Case(
        "a processor that is no JSON",
        VISION,
        CHANGED,
        "fetch the file again",
        as_published("preprocessor_config.json"),
        of_clip(lambda world: (world.folder / "changed" / "preprocessor_config.json").write_text("{")),
    ),
    Case(
        "a multi-modal model that needs code",
        TEXT,
        CHANGED,
        "(many publishers",
        then(named("right")),
        of_llava(edited("changed/config.json", model_type="internvl_chat")),
    ),
    Case(
        "a language model that does not run alone",
        TEXT,
        CHANGED,
        "with a language model of a supported type",
        then(named("right")),
        of_kosmos,
    ),
    Case(
        "a processor without its template",
        TEXT,
        CHANGED,
        "fetch the file again, or delete it",
        lambda world, step: (world.folder / "changed" / "chat_template.json").unlink(),
        of_llava(lambda world: (world.folder / "changed" / "chat_template.json").write_text("{}")),
    ),
)
