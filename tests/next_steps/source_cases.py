"""Steps of errors of `offsite import`: folders and files of other forms than a plain checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from artifacts import GONE
from model_owner.importing.test_import_model import as_bin
from model_owner.importing.test_mxfp4 import in_mxfp4
from model_owner.importing.test_quantised_source import in_fp8
from next_steps.import_cases import CHANGED, DOWNLOAD, LOCATE, OTHERS, QUANTISED, named, put_into
from next_steps.world import (
    IMPORT,
    PLUG,
    Case,
    Mend,
    Spoil,
    World,
    as_advised,
    edited,
    kept,
    program,
    restored,
    runs,
    then,
)
from offsite.cli import main
from offsite.model_owner.importing import quantised_source
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS
from tiny_types import tiny_type_base

TRANSFORMERS = "model_owner/importing/by_transformers.py"
BIN = "pytorch_model.bin"


def unreadable(name: str) -> Spoil:
    """A file that this user may not read; the rights themselves would not stop the tests' user everywhere."""

    def forbid(world: World) -> None:
        file, opened = world.folder / name, Path.open

        def refused(path: Path, *words: Any, **more: Any) -> Any:
            if path == file:
                raise PermissionError(13, os.strerror(13), str(path))
            return opened(path, *words, **more)

        world.patch.setattr(Path, "open", refused)

    return forbid


def permitted(world: World, step: str) -> None:
    world.patch.undo()


def content(name: str, text: bytes) -> Spoil:
    """Other bytes in a file of the base."""

    def write(world: World) -> None:
        kept(name)(world)
        (world.folder / "base" / name).write_bytes(text)

    return write


def beside(name: str, text: bytes = b"....") -> Spoil:
    """A file in the place of the weights, or of the whole base where the name has a folder."""

    def write(world: World) -> None:
        kept(WEIGHTS)(world)
        file = world.folder / "base" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(text)

    return write


def files(*names: str, **texts: str) -> Spoil:
    """A folder "other" with files of a few bytes."""

    def write(world: World) -> None:
        for name in names:
            file = world.folder / "other" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(texts.get(file.stem, "{}"))

    return write


def link(world: World) -> None:
    (world.folder / "link").symlink_to(world.folder / "nowhere")


def fetched_there(world: World, step: str) -> None:
    shutil.copytree(world.folder / "base", world.folder / "nowhere")


def index(text: str, whole: bool) -> Spoil:
    def write(world: World) -> None:
        if not whole:
            from model_owner.importing.test_locate_source import sharded

            sharded(world.folder / "base", world.folder / "changed")
            shutil.copy(world.folder / "changed" / INDEX, world.folder / INDEX)
        (world.folder / ("base" if whole else "changed") / INDEX).write_text(text)

    return write


def deleted(world: World, step: str) -> None:
    Path(step.removeprefix("delete ").partition(": ")[0]).unlink()


def index_again(world: World, step: str) -> None:
    shutil.copy(world.folder / INDEX, world.folder / "changed" / INDEX)


def as_bin_of(text: bytes | None) -> Spoil:
    def write(world: World) -> None:
        source = as_bin(world.folder / "base", world.folder / "changed")
        shutil.copy(source / BIN, world.folder / BIN)
        if text is not None:
            (source / BIN).write_bytes(text)

    return write


def whole_again(world: World, step: str) -> None:
    shutil.copy(world.folder / BIN, world.folder / "changed" / BIN)


def further_blocks(world: World) -> None:
    """Blocks that predict tokens further on, which transformers leaves out without a word."""
    tiny_type_base(world.folder / "plain", "glm4_moe", 3)
    as_bin(world.folder / "plain", world.folder / "without")
    tensors = load_file(world.folder / "plain" / WEIGHTS)
    tensors["model.layers.92.mlp.up_proj.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, world.folder / "plain" / WEIGHTS, {"format": "pt"})
    as_bin(world.folder / "plain", world.folder / "changed")


def full_disk(world: World) -> None:
    from transformers import PreTrainedModel

    def refused(model: object, folder: Path) -> None:
        raise SafetensorError("No space left on device")

    as_bin_of(None)(world)
    world.patch.setattr(PreTrainedModel, "save_pretrained", refused)


def joined_by(name: str) -> tuple[Spoil, Mend]:
    """A checkpoint in parts, with a program that joins them as the foreign one does; and what the step then says."""
    script = "import shutil, sys, os\nos.makedirs('merged')\nshutil.copy('published/model.safetensors', 'merged')\n"

    def make(world: World) -> None:
        if name == "accelerate":
            files("pytorch_model_fsdp_0/.metadata")(world)
            program(world, "accelerate", script)
        else:
            files("zero_to_fp32.py", "latest", zero_to_fp32=script)(world)
            program(world, "python", "import runpy, sys\nrunpy.run_path(sys.argv[1])\n")
        put_into("published")(world)

    def join(world: World, step: str) -> str:
        assert name in step
        runs(world, step)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(world.folder / "base" / file, world.folder / "merged" / file)
        return named("merged")

    return make, join


def sentences(world: World) -> None:
    put_into("other/0_Transformer")(world)
    (world.folder / "other" / "modules.json").write_text("[]")


def adapter_plugged(world: World) -> None:
    assert main(world.words(f"{PLUG} --as adapter --out {{folder}}/plugged")) == 0


def merged_instead(world: World, step: str) -> str:
    assert main(world.words(f"{PLUG} --as merged --again --out {{folder}}/merged")) == 0
    return named("merged")


def fp8_without_settings(world: World) -> None:
    in_fp8(world.folder / "base", world.folder / "changed")
    edited("changed/config.json", quantization_config=GONE)(world)


def fp8_without_its_package(world: World) -> None:
    in_fp8(world.folder / "base", world.folder / "changed")
    world.patch.setitem(quantised_source._DEQUANTISED, "fp8", ("nowhere_to_be_found", "nowhere"))


def installed(world: World, step: str) -> None:
    assert step == "pip install nowhere"
    world.patch.undo()


def half_of_mxfp4(world: World) -> None:
    in_mxfp4(world.folder / "changed")
    shutil.copy(world.folder / "changed" / WEIGHTS, world.folder / WEIGHTS)
    tensors = load_file(world.folder / "changed" / WEIGHTS)
    del tensors[next(name for name in tensors if name.endswith("_scales"))]
    save_file(tensors, world.folder / "changed" / WEIGHTS, {"format": "pt"})


def weights_again(world: World, step: str) -> None:
    shutil.copy(world.folder / WEIGHTS, world.folder / "changed" / WEIGHTS)


OTHER = named("other")
INSTEAD = then(IMPORT)
CASES = (
    Case(
        "a file that nobody may read",
        DOWNLOAD,
        IMPORT,
        "that you may read the file",
        permitted,
        unreadable(f"base/{WEIGHTS}"),
    ),
    Case(
        "a web page", DOWNLOAD, IMPORT, "by the link of the file itself", restored, content(WEIGHTS, b"<!DOCTYPE html>")
    ),
    Case("an empty file", DOWNLOAD, IMPORT, "download the file again", restored, content(WEIGHTS, b"")),
    Case(
        "an index that is none",
        DOWNLOAD,
        IMPORT,
        "is complete without it",
        deleted,
        index("[]", True),
        "is not an index",
    ),
    Case(
        "a broken index", DOWNLOAD, CHANGED, "fetch that file again", index_again, index("{", False), "is not an index"
    ),
    Case(
        "weights of TensorFlow",
        DOWNLOAD,
        IMPORT,
        "fetch the model's model.safetensors",
        restored,
        beside("tf_model.h5"),
    ),
    Case(
        "an export to ONNX",
        DOWNLOAD,
        IMPORT,
        "import the checkpoint that was exported",
        restored,
        beside("onnx/model.onnx"),
    ),
    Case(
        "a broken file of torch",
        TRANSFORMERS,
        CHANGED,
        "check that the file is complete",
        whole_again,
        as_bin_of(b"x" * 99),
    ),
    Case(
        "blocks that are left out", TRANSFORMERS, CHANGED, "without these parts", then(named("without")), further_blocks
    ),
    Case("a full disk", TRANSFORMERS, CHANGED, "free some space on that disk", permitted, full_disk),
    Case(
        "no JSON in a config",
        "model_owner/importing/import_model.py",
        IMPORT,
        "fetch the file again",
        restored,
        content("config.json", b"{"),
        "cannot read",
    ),
    Case(
        "a list as a config",
        "model_owner/importing/import_model.py",
        IMPORT,
        "fetch the file again",
        restored,
        content("config.json", b"[]"),
        "is not a JSON object",
    ),
    Case("a link to nowhere", LOCATE, named("link"), "part of the download was deleted", fetched_there, link),
    Case("a file of NeMo", LOCATE, named("other/model.nemo"), "and name their folder", INSTEAD, files("model.nemo")),
    Case("a pipeline of images", OTHERS, OTHER, "import a causal language model", INSTEAD, files("model_index.json")),
    Case("a model of sentences", OTHERS, OTHER, "name that folder: `offsite import", as_advised, sentences),
    Case(
        "parts of DeepSpeed",
        OTHERS,
        OTHER,
        "zero_to_fp32.py",
        joined_by("zero_to_fp32")[1],
        joined_by("zero_to_fp32")[0],
    ),
    Case(
        "parts of FSDP",
        OTHERS,
        OTHER,
        "accelerate merge-weights",
        joined_by("accelerate")[1],
        joined_by("accelerate")[0],
    ),
    Case(
        "a publisher's own format",
        OTHERS,
        OTHER,
        "fetch the files that transformers loads",
        INSTEAD,
        files("params.json"),
    ),
    Case("a folder of notes", OTHERS, OTHER, "that transformers would load", INSTEAD, files("notes.txt")),
    Case(
        "an adapter of ours to import",
        OTHERS,
        named("plugged"),
        "plug the return in with --as merged",
        merged_instead,
        adapter_plugged,
    ),
    Case(
        "FP8 without settings",
        QUANTISED,
        CHANGED,
        "whose weights are plain",
        INSTEAD,
        fp8_without_settings,
        "config.json does not say how",
    ),
    Case("FP8 without its package", QUANTISED, CHANGED, "pip install", installed, fp8_without_its_package),
    Case("half of MXFP4", QUANTISED, CHANGED, "fetch the model again", weights_again, half_of_mxfp4),
)
