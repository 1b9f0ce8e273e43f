"""Finds the model at the path that the user gave: a file, a model's folder, or a folder that contains one. Torch-free.

For any other path, the error says what the path is and what to do.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offsite.errors import OffsiteError, StorageError, UsageError
from offsite.model_owner.importing.check_download import check_download, require_content
from offsite.model_owner.importing.other_folders import refuse_other_folders
from offsite.protocol.contents import CONFIG
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS

_GGUF, _OLD_GGML = b"GGUF", (b"lmgg", b"fmgg", b"tjgg", b"algg")  # the old formats of llama.cpp, as bytes of a file
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
_OTHERS = {
    ".h5": "TensorFlow", ".msgpack": "Flax", ".keras": "Keras", ".tflite": "LiteRT", ".mlmodel": "Core ML",
    ".mlpackage": "Core ML", ".engine": "TensorRT", ".plan": "TensorRT", ".nemo": "NeMo", ".llamafile": "llamafile",
    ".npz": "NumPy", ".pkl": "pickle", ".joblib": "joblib", ".mar": "TorchServe", ".pb": "TensorFlow",
    ".pte": "ExecuTorch", ".xml": "OpenVINO", ".param": "ncnn", ".ggml": "GGML", ".litertlm": "LiteRT",
    ".task": "MediaPipe",
}  # fmt: skip
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_HUB_FOLDER = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True)
class Located:
    """The file or folder of the model that `locate_source` found."""

    path: Path  # a GGUF or ONNX file, or a folder with config.json and weights
    kind: Literal["gguf", "onnx", "folder"]
    notes: tuple[str, ...] = ()  # messages for the user if `path` is not the path that the user named


def locate_source(path: Path) -> Located:
    """Find the model at a path that the user named.

    The path can be a GGUF or ONNX file, a folder with a config and weights, a folder with one GGUF or ONNX file, or a
    model's folder in the cache of the Hugging Face hub.

    Raises:
        UsageError: the path is not a model; the error says what it is, or that it does not exist.
        StorageError: the files are not completely downloaded.
        IncompatibleError: the path is an adapter, a bundle, or another artifact or model that is not a base.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise _not_there(path)
    return _file(path)


def _not_there(path: Path) -> OffsiteError:
    """The error for a path that does not exist; it recognises broken links and names of models on the hub."""
    if path.is_symlink():
        return StorageError(
            f"{path} is a link to a file that is not there",
            reasons=[f"it links to {path.readlink()}"],
            next_step="fetch the model again: part of the download was deleted or moved",
        )
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    return UsageError(
        f"{path} is no model: there is no such file or folder",
        next_step=f"if it is a model of the hub, fetch it first: `hf download {path} --local-dir model/`"
        if hub
        else "check the path",
    )


def _file(path: Path) -> Located:
    """`locate_source` for a file: a GGUF or ONNX file; any other file is an error."""
    suffix, start = path.suffix.lower(), require_content(path)[:4]
    if start == _GGUF or (suffix == ".gguf" and start not in _OLD_GGML):
        return Located(_whole_gguf(path), "gguf")
    if suffix == ".onnx":
        return Located(path, "onnx")
    if start in _OLD_GGML or suffix in _OTHERS or suffix in _ARCHIVES:
        raise _other_file(path, "GGML (the format before GGUF)" if start in _OLD_GGML else _OTHERS.get(suffix))
    has_config = (path.parent / CONFIG).is_file()
    if path.name.endswith(_WEIGHT_FILES) or has_config:
        raise UsageError(
            f"{path} is one file of a model, expected its folder" if has_config else f"{path} holds weights alone",
            reasons=[] if has_config else [f"its folder has no {CONFIG}, which says what model the weights are of"],
            next_step=f"name the folder: `offsite import {shlex.quote(str(path.parent))} --out base/`"
            if has_config
            else f"put the file into a folder with the {CONFIG} and the tokenizer of its model, and name the folder",
        )
    raise UsageError(
        f"{path} is no model",
        reasons=[f"expected a .gguf or .onnx file, or a folder with {CONFIG} and weights"],
        next_step="name the file or folder that transformers would load",
    )


def _other_file(path: Path, name: str | None) -> UsageError:
    """The error for a file in the unsupported format `name`, or for an archive if `name` is None."""
    if name is None:
        unpack = "unzip" if path.suffix.lower() == ".zip" else "tar -xf"
        return UsageError(
            f"{path} is no model, but an archive: unpack it first",
            next_step=f"run `{unpack} {shlex.quote(str(path))}`, and name the folder or the .gguf file that comes out",
        )
    return UsageError(
        f"{path} is a {name} file, which is not supported",
        reasons=["supported: .gguf and .onnx files, and folders with safetensors or pytorch_model.bin"],
        next_step="fetch the model's safetensors, which most publishers offer as well, and name their folder",
    )


def _in_folder(folder: Path) -> Located:
    """`locate_source` for a folder."""
    cached = _in_hub_cache(folder)
    if cached is not None:
        found = _in_folder(cached)
        return Located(found.path, found.kind, (f"read from {cached} in the hub's cache", *found.notes))
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        raise UsageError(
            f"{folder} is no model: the folder is empty",
            next_step="check that the download went there, and name the folder with the model's files",
        )
    refuse_other_folders(folder, names)
    lone = _lone_file(folder, names)
    if lone is not None:
        found = _file(lone)
        return Located(found.path, found.kind, (f"read from {lone.name}, the only model in the folder",))
    check_download(folder, names)
    return Located(folder, "folder")


def _in_hub_cache(folder: Path) -> Path | None:
    """The snapshot to import from a model's folder in the cache of the Hugging Face hub; None for any other folder.

    Raises:
        UsageError: the folder has several snapshots or none, or is the whole cache.
    """
    if (folder / "snapshots").is_dir():
        snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
        main = folder / "refs" / "main"
        wanted = folder / "snapshots" / main.read_text().strip() if main.is_file() else None
        if wanted in snapshots:
            return wanted
        if len(snapshots) == 1:
            return snapshots[0]
        raise UsageError(
            f"{folder} is a model's folder in the hub's cache, and holds {len(snapshots) or 'no'} snapshots",
            reasons=[str(snapshot) for snapshot in snapshots],
            next_step="name one of these folders" if snapshots else "fetch the model again with `hf download`",
        )
    inside = folder / "hub" if not list(folder.glob("models--*")) else folder
    models = sorted(inside.glob("models--*"))
    if not models or (folder / CONFIG).exists():
        return None
    raise UsageError(
        f"{folder} is no model, but the hub's cache",
        reasons=[f"it holds {'/'.join(m.groups()) if (m := _HUB_FOLDER.fullmatch(p.name)) else p.name}: {p}"
                 for p in models[:20]],
        next_step=f"name one of them: `offsite import {shlex.quote(str(models[0]))} --out base/`",
    )  # fmt: skip


def _lone_file(folder: Path, names: list[str]) -> Path | None:
    """The one GGUF or ONNX file in a folder without other weights; None for any other folder.

    `names` are the names of all files and folders in it.

    Raises:
        UsageError: the folder has several GGUF files.
    """
    if WEIGHTS in names or INDEX in names or any(name.endswith((".safetensors", ".bin")) for name in names):
        return None
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    whole = [name for name in ggufs if not (match := _SPLIT.fullmatch(name)) or int(match[2]) == 1]
    if ggufs and len(whole) != 1:
        raise UsageError(
            f"{folder} holds {len(ggufs)} GGUF files, expected one",
            reasons=ggufs[:20],
            next_step=f"name one of them: `offsite import {shlex.quote(str(folder / ggufs[0]))} --out base/`",
        )
    if whole:
        return folder / whole[0]
    onnx = [name for name in names if name.lower().endswith(".onnx")]
    if len(onnx) == 1 and CONFIG not in names:
        return folder / onnx[0]
    return None


def _whole_gguf(path: Path) -> Path:
    """Check that a GGUF file is a complete model, and return its path.

    Raises:
        UsageError: the file is one part of a model that is split into several files.
    """
    match = _SPLIT.fullmatch(path.name)
    if match and int(match[3]) > 1:
        parts = [f"{match[1]}-{part:05}-of-{match[3]}.gguf" for part in range(1, int(match[3]) + 1)]
        missing = [name for name in parts if not (path.parent / name).exists()]
        raise UsageError(
            f"{path} is part {int(match[2])} of a model that is split into {int(match[3])} files",
            reasons=[f"missing {name}" for name in missing],
            next_step="join them with llama.cpp's tool, and name the result: "
            f"`llama-gguf-split --merge {shlex.quote(str(path.parent / parts[0]))} "
            f"{shlex.quote(str(path.parent / f'{match[1]}.gguf'))}`",
        )
    return path
