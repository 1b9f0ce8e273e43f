"""Steps of errors of `offsite import`: what people name as a model, and what they then do."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model_owner.importing.test_import_model import as_bin
from model_owner.importing.test_locate_source import POINTER, sharded
from model_owner.importing.test_quantised_source import FORMS, in_fp8, quantised
from next_steps.world import IMPORT, OUT, PACK, Case, Spoil, World, as_advised, kept, restored, runs, then
from offsite.cli import main
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS

LOCATE, DOWNLOAD = "model_owner/importing/locate_source.py", "model_owner/importing/check_download.py"
OTHERS, QUANTISED = "model_owner/importing/other_folders.py", "model_owner/importing/quantised_source.py"
CHANGED = IMPORT.replace("/base", "/changed")


def named(name: str) -> str:
    return f"import {{folder}}/{name}{OUT}"


def put_into(place: str, *, without: tuple[str, ...] = ()) -> Spoil:
    """A copy of the base at another place, without some of its files."""
    return lambda world: (
        shutil.copytree(world.folder / "base", world.folder / place, ignore=shutil.ignore_patterns(*without)) and None
    )


def pointer(world: World) -> None:
    kept(WEIGHTS)(world)
    (world.folder / "base" / WEIGHTS).write_bytes(POINTER)


def broken_link(world: World) -> None:
    kept(WEIGHTS)(world)
    (world.folder / "base" / WEIGHTS).symlink_to(world.folder / "blobs" / "0")


def archive(world: World) -> None:
    put_into("unpacked")(world)
    shutil.make_archive(str(world.folder / "model"), "tar", world.folder, "unpacked")
    shutil.rmtree(world.folder / "unpacked")


def unpacked(world: World, step: str) -> str:
    runs(world, step)
    return named("unpacked")


def in_cache(*snapshots: str) -> Spoil:
    def make(world: World) -> None:
        for name in snapshots:
            put_into(f"hub/models--org--name/snapshots/{name}")(world)

    return make


def weights_alone(world: World) -> None:
    (world.folder / "alone").mkdir()
    shutil.copy(world.folder / "base" / WEIGHTS, world.folder / "alone" / WEIGHTS)


def rest_beside(world: World, step: str) -> str:
    shutil.copytree(world.folder / "base", world.folder / "alone", dirs_exist_ok=True)
    return named("alone")


def stale_index(world: World) -> None:
    content = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (world.folder / "base" / INDEX).write_text(json.dumps(content))


def deleted(world: World, step: str) -> None:
    path = Path(step.removeprefix("delete ").partition(": ")[0])
    assert path.name == INDEX
    path.unlink()


def parts_without_index(world: World) -> None:
    sharded(world.folder / "base", world.folder / "changed")
    shutil.move(world.folder / "changed" / INDEX, world.folder / INDEX)


def missing_part(world: World) -> None:
    sharded(world.folder / "base", world.folder / "changed")
    part = sorted((world.folder / "changed").glob("model-*.safetensors"))[0]
    shutil.move(part, world.folder / part.name)


def fetched(pattern: str) -> "Spoil":
    def fetch(world: World) -> None:
        for path in world.folder.glob(pattern):
            shutil.move(path, world.folder / "changed" / path.name)

    return fetch


def renamed(world: World) -> None:
    (world.folder / "base" / WEIGHTS).rename(world.folder / "base" / "consolidated.safetensors")


def named_back(world: World, step: str) -> None:
    (world.folder / "base" / "consolidated.safetensors").rename(world.folder / "base" / step.rpartition(" ")[2])


def adapter_beside(world: World) -> None:
    (world.folder / "base" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def adapter_moved(world: World, step: str) -> None:
    assert "adapter_config.json" in step
    (world.folder / "moved").mkdir()
    shutil.move(world.folder / "base" / "adapter_config.json", world.folder / "moved" / "adapter_config.json")


def adapter_alone(world: World) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these libraries about each other
        model = AutoModelForCausalLM.from_pretrained(world.folder / "base")
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(world.folder / "adapter")


def merged(world: World, step: str) -> str:
    runs(world, step)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.folder / "base" / name, world.folder / "merged" / name)
    return named("merged")


def not_finite(world: World) -> None:
    kept(WEIGHTS)(world)
    tensors = load_file(world.folder / "kept" / WEIGHTS)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, world.folder / "base" / WEIGHTS, {"format": "pt"})


def bin_without_a_tensor(world: World) -> None:
    source = as_bin(world.folder / "base", world.folder / "changed")
    whole = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save(whole, world.folder / "pytorch_model.bin")
    del whole["model.norm.weight"]
    torch.save(whole, source / "pytorch_model.bin")


def gptq(world: World) -> None:
    quantised(world.folder / "base", world.folder / "changed", *FORMS["GPTQ"])


def fp8(world: World) -> None:
    in_fp8(world.folder / "base", world.folder / "changed")


def dequantised(world: World, step: str) -> str:
    assert "`offsite import MODEL --out base/`" in step
    assert main(world.words("import {folder}/changed --out {folder}/plain")) == 0
    return f"{PACK.replace('/base', '/plain')}{OUT}"


CASES = (
    Case("one file of a model", LOCATE, named("base/config.json"), "name the folder: `offsite import", as_advised),
    Case("weights alone", LOCATE, named(f"alone/{WEIGHTS}"), "put the file into a folder", rest_beside, weights_alone),
    Case(
        "a path that is not there",
        LOCATE,
        named("bas"),
        "check the path",
        then(IMPORT),
        what="there is no such file or folder",
    ),
    Case("no model", LOCATE, named("rows.jsonl"), "that transformers would load", then(IMPORT)),
    Case(
        "an archive",
        LOCATE,
        named("model.tar"),
        "and name the folder",
        unpacked,
        archive,
        what="but an archive",
    ),
    Case(
        "the hub's cache",
        LOCATE,
        named("hub"),
        "name one of them: `offsite import",
        as_advised,
        in_cache("abc"),
        what="the hub's cache",
    ),
    Case(
        "several snapshots",
        LOCATE,
        named("hub/models--org--name"),
        "name one of these folders",
        then(named("hub/models--org--name/snapshots/def")),
        in_cache("abc", "def"),
    ),
    Case(
        "an empty folder",
        LOCATE,
        named("empty"),
        "name the folder with the model's files",
        then(IMPORT),
        lambda world: (world.folder / "empty").mkdir(),
    ),
    Case("a broken link", DOWNLOAD, IMPORT, "fetch the model again", restored, broken_link),
    Case("a Git LFS pointer", DOWNLOAD, IMPORT, "lfs pull", restored, pointer),
    Case("a config alone", DOWNLOAD, IMPORT, "fetch the weights into the same folder", restored, kept(WEIGHTS)),
    Case(
        "a stale index",
        DOWNLOAD,
        IMPORT,
        "is complete without it",
        deleted,
        stale_index,
        what="holds weights twice",
    ),
    Case(
        "parts without an index",
        DOWNLOAD,
        CHANGED,
        "from the place where the weights were published",
        lambda world, step: fetched(INDEX)(world),
        parts_without_index,
    ),
    Case(
        "a part is missing",
        DOWNLOAD,
        CHANGED,
        "it continues with the missing files",
        lambda world, step: fetched("model-*.safetensors")(world),
        missing_part,
    ),
    Case("weights of another name", DOWNLOAD, IMPORT, "rename the file to", named_back, renamed),
    Case(
        "weights without a config",
        OTHERS,
        IMPORT,
        "from the place where the weights were published",
        restored,
        kept("config.json"),
    ),
    Case("a folder inside", OTHERS, named("up"), "name the folder: `offsite import", as_advised, put_into("up/one")),
    Case("a bundle to import", OTHERS, named("bundle"), "to tune it: `offsite tune", as_advised),
    Case("a return to import", OTHERS, named("return"), "to use it: `offsite plug-in", as_advised),
    Case("an adapter's settings in a base", OTHERS, IMPORT, "out of the folder", adapter_moved, adapter_beside),
    Case("an adapter of PEFT", OTHERS, named("adapter"), "merge it into its base with PEFT", merged, adapter_alone),
    Case(
        "NaN in the weights",
        "model_owner/importing/write_weights.py",
        IMPORT,
        "fetch the model again",
        restored,
        not_finite,
    ),
    Case(
        "a .bin file without a tensor",
        "model_owner/importing/by_transformers.py",
        CHANGED,
        "from where it was published",
        lambda world, step: fetched("pytorch_model.bin")(world),
        bin_without_a_tensor,
    ),
    Case(
        "GPTQ",
        QUANTISED,
        CHANGED,
        "import the checkpoint that it was made from",
        then(IMPORT),
        gptq,
        what="does not dequantise them",
    ),
    Case(
        "a base in FP8",
        "model_owner/base_model.py",
        f"{PACK.replace('/base', '/changed')}{OUT}",
        "turn them into plain weights",
        dequantised,
        fp8,
    ),
)
