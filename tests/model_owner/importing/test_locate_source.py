"""What people name as a model: each form is imported, or the error says what it is and which step leads to a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from artifacts import copied_folder, lora_return, packed
from offsite.errors import IncompatibleError, OffsiteError, StorageError, UsageError
from offsite.model_owner.importing.import_model import import_model
from offsite.model_owner.importing.import_record import read_record
from offsite.model_owner.importing.locate_source import locate_source
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, open_checkpoint, write_checkpoint
from offsite.storage.safetensors_files import copied
from tiny import MakeBase, Parties

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def folder_of(path: Path, *names: str, **contents: bytes) -> Path:
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents.get(name, b"{}"))
    return path


def refused(path: Path, kind: type[OffsiteError], what: str, step: str) -> OffsiteError:
    with pytest.raises(kind) as caught:
        locate_source(path)
    assert what in str(caught.value)
    assert step in (caught.value.next_step or "")
    return caught.value


def sharded(base: Path, out: Path) -> Path:
    """The same base in shards with an index."""
    copied_folder(base, out)
    tensors = list(open_checkpoint(out).tensors.values())
    kept = out / "kept.safetensors"
    (out / WEIGHTS).rename(kept)
    moved = [copied(tensor) for tensor in open_checkpoint(base).tensors.values()]
    write_checkpoint(out, moved, shard_bytes=sum(t.size for t in tensors) // 3)
    kept.unlink()
    return out


def test_a_folder_with_one_gguf_in_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "x.GGUF", "README.md", "mmproj-x-f16.gguf")
    located = locate_source(folder)
    assert (located.path, located.kind) == (folder / "x.GGUF", "gguf")
    assert "x.GGUF" in located.notes[0]
    assert locate_source(folder / "x.GGUF").kind == "gguf"
    blob = tmp_path / "sha256-00"  # as Ollama stores it
    blob.write_bytes(b"GGUF\x03\x00")
    assert locate_source(blob).kind == "gguf"


def test_several_ggufs(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "a.Q4_K_M.gguf", "a.Q8_0.gguf")
    refused(folder, UsageError, "holds 2 GGUF files", f"offsite import {folder / 'a.Q4_K_M.gguf'} --out base/")


def test_a_split_gguf(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "a-00001-of-00003.gguf", "a-00002-of-00003.gguf")
    step = f"llama-gguf-split --merge {folder / 'a-00001-of-00003.gguf'} {folder / 'a.gguf'}"
    error = refused(folder, UsageError, "split into 3 files", step)
    assert error.reasons == ("missing a-00003-of-00003.gguf",)
    refused(folder / "a-00002-of-00003.gguf", UsageError, "part 2", step)
    one = folder_of(tmp_path / "one", "a-00001-of-00001.gguf")
    assert locate_source(one).kind == "gguf"


def test_the_format_before_gguf(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(b"tjgg" + bytes(20))
    refused(tmp_path / "old.bin", UsageError, "GGML", "safetensors")


def test_a_model_in_the_hubs_cache(base_of: MakeBase, tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    root = cache / "models--org--name"
    copied_folder(base_of(), root / "snapshots" / "abc")
    located = locate_source(root)
    assert located.path == root / "snapshots" / "abc"
    made = import_model(root, tmp_path / "base")
    assert "abc" in read_record(made.folder).notes[0]
    refused(cache, UsageError, "org/name", f"offsite import {root} --out base/")
    refused(tmp_path, UsageError, "org/name", f"offsite import {root} --out base/")
    shutil.copytree(root / "snapshots" / "abc", root / "snapshots" / "def")
    refused(root, UsageError, "holds 2 snapshots", "name one of these")
    folder_of(root, "refs/main", **{"refs/main": b"def\n"})
    assert locate_source(root).path == root / "snapshots" / "def"
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    refused(root, UsageError, "holds no snapshots", "hf download")


def test_a_link_whose_file_was_deleted(base_of: MakeBase, tmp_path: Path) -> None:
    folder = copied_folder(base_of(), tmp_path / "m")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "blobs" / "00")
    refused(folder, StorageError, "link to a file that is not there", "fetch the model again")
    refused(folder / WEIGHTS, StorageError, "link to a file that is not there", "fetch the model again")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_git_lfs_pointers(base_of: MakeBase, tmp_path: Path, name: str) -> None:
    folder = copied_folder(base_of(), tmp_path / "m")
    (folder / name).write_bytes(POINTER)
    refused(folder, StorageError, f"{name} is a Git LFS pointer", f"git -C {folder} lfs pull")


def test_pointers_in_place_of_single_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.onnx", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(POINTER)
        refused(tmp_path / name, StorageError, "Git LFS pointer", "lfs pull")
    (tmp_path / "b.gguf").write_bytes(b"<!DOCTYPE html><html>")
    refused(tmp_path / "b.gguf", StorageError, "web page", "download it again")
    (tmp_path / "c.gguf").write_bytes(b"")
    refused(tmp_path / "c.gguf", StorageError, "is empty", "download")


def test_a_stale_index_beside_a_whole_file(base_of: MakeBase, tmp_path: Path) -> None:
    folder = copied_folder(base_of(), tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    error = refused(folder, StorageError, "holds weights twice", f"delete {folder / INDEX}")
    assert "model-00001-of-00002.safetensors" in error.reasons[0]
    (folder / INDEX).unlink()  # the step works
    import_model(folder, tmp_path / "base")


def test_missing_shards(base_of: MakeBase, tmp_path: Path) -> None:
    folder = sharded(base_of(), tmp_path / "m")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert locate_source(folder).kind == "folder"
    (folder / shards[1]).unlink()
    folder_of(folder, ".cache/huggingface/download/x.incomplete")
    error = refused(folder, StorageError, f"1 of {len(shards)} files with weights are missing", "download again")
    assert error.reasons == (f"missing {shards[1]}", "not finished: x.incomplete")
    (folder / INDEX).unlink()
    refused(folder, StorageError, "but not their index", f"fetch {INDEX}")


@pytest.mark.parametrize(
    ("names", "kind", "what", "step"),
    [
        ([], UsageError, "the folder is empty", "check that the download went there"),
        (["config.json"], StorageError, "a config, but no weights", "fetch the weights"),
        (["model.safetensors"], UsageError, "no config.json", "fetch config.json"),
        (["config.json", "consolidated.safetensors"], UsageError, "have the name consolidated", "rename"),
        (["params.json", "consolidated.00.pth"], UsageError, "publisher's own code", "fetch the files"),
        (["config.json", "tf_model.h5"], IncompatibleError, "TensorFlow alone", "fetch the model's model.safetensors"),
        (["config.json", "flax_model.msgpack"], IncompatibleError, "Flax alone", "fetch the model's"),
        (["config.json", "model.onnx"], IncompatibleError, "ONNX export", "import the checkpoint"),
        (["config.json", "onnx/model.onnx"], IncompatibleError, "ONNX export", "import the checkpoint"),
        (["model_index.json", "unet/config.json"], IncompatibleError, "diffusers pipeline", "causal language model"),
        (["modules.json", "0_Transformer/config.json"], UsageError, "sentence-transformers", "0_Transformer"),
        (["zero_to_fp32.py", "latest"], UsageError, "DeepSpeed", "zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/.metadata"], UsageError, "FSDP", "accelerate merge-weights"),
        (["checkpoint-90/config.json", "checkpoint-100/config.json"], UsageError, "several inside", "checkpoint-100"),
        (["name/config.json"], UsageError, "holds one inside", "name --out base/"),
        (["notes.txt"], UsageError, "is no model", "transformers would load"),
    ],
)
def test_folders_that_are_no_checkpoint(
    tmp_path: Path, names: list[str], kind: type[OffsiteError], what: str, step: str
) -> None:
    (tmp_path / "m").mkdir()
    refused(folder_of(tmp_path / "m", *names), kind, what, step)


@pytest.mark.parametrize(
    ("name", "what", "step"),
    [
        ("model.tar", "an archive", "tar -xf"),
        ("model.tar.gz", "an archive", "tar -xf"),
        ("model.zip", "an archive", "unzip"),
        ("model.nemo", "NeMo", "safetensors"),
        ("tf_model.h5", "TensorFlow", "safetensors"),
        ("flax_model.msgpack", "Flax", "safetensors"),
        ("model.safetensors", "weights alone", "config.json"),
        ("pytorch_model.bin", "weights alone", "config.json"),
        ("notes.txt", "is no model", "transformers would load"),
    ],
)
def test_single_files(tmp_path: Path, name: str, what: str, step: str) -> None:
    (tmp_path / name).write_bytes(b"....")
    refused(tmp_path / name, UsageError, what, step)


def test_one_file_of_a_folder(base_of: MakeBase, tmp_path: Path) -> None:
    folder = copied_folder(base_of(), tmp_path / "m")
    for name in (WEIGHTS, "tokenizer.json", "config.json"):
        refused(folder / name, UsageError, "expected its folder", f"offsite import {folder} --out base/")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nothing", UsageError, "no such file or folder", "check the path")
    monkeypatch.chdir(tmp_path)
    refused(Path("org/name"), UsageError, "no such file", "hf download org/name --local-dir model/")


def adapter_config(**settings: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", **settings}).encode()


def test_a_peft_adapter(base_of: MakeBase, tmp_path: Path) -> None:
    files = {"adapter_config.json": adapter_config()}
    folder = folder_of(tmp_path / "m", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", **files)
    error = refused(folder, IncompatibleError, "LORA adapter of PEFT", "merge_and_unload")
    assert "org/base" in error.reasons[0]
    beside = copied_folder(base_of(), tmp_path / "beside")
    (beside / "adapter_config.json").write_bytes(adapter_config())
    refused(beside, IncompatibleError, "not a plain checkpoint", "move adapter_config.json out")


def test_artifacts_of_this_project(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties)
    refused(bundle.folder, UsageError, "is a bundle", "offsite tune")
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    refused(returned.folder, UsageError, "is a return", "offsite plug-in base/")
