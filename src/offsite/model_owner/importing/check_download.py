"""Checks that the weights in a folder were downloaded completely, before a library reads them. Torch-free."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS
from offsite.storage.strict_json import strict_json

_LFS = b"version https://git-lfs"
_PAGE = (b"<!doctype html", b"<html")
BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_OTHER_LIBRARIES = {"tf_model.h5": "TensorFlow", "flax_model.msgpack": "Flax", "rust_model.ot": "Rust"}


def require_content(path: Path) -> bytes:
    """Raise an error if a path is not the downloaded file: if it is a Git LFS pointer, a web page, or empty.

    Returns:
        The first bytes of the file, at most 64.

    Raises:
        StorageError: the file is one of these, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        step = "check the path, and that you may read the file"
        raise StorageError(f"cannot read {path}: {error.strerror}", next_step=step) from error
    if start.startswith(_LFS):
        raise StorageError(
            f"{path} is a Git LFS pointer, and not the file itself",
            reasons=["the repository was cloned without Git LFS, so large files were not downloaded"],
            next_step=f"run `git lfs install`, then `git -C {shlex.quote(str(path.parent))} lfs pull`",
        )
    if start.lower().startswith(_PAGE):
        raise StorageError(
            f"{path} is a web page, and not the file that it is named for",
            next_step="download it again, by the link of the file itself (on the hub: resolve in place of blob)",
        )
    if not start:
        raise StorageError(f"{path} is empty", next_step="download the file again")
    return start


def check_download(folder: Path, names: Sequence[str]) -> None:
    """Raise an error if a folder with a config has no weights, or not all of them.

    Args:
        folder: the model's folder.
        names: the names of all files and folders in it.

    Raises:
        StorageError: a file is missing, or is a Git LFS pointer, a web page or empty.
        UsageError: the folder has no weights in a supported format.
        IncompatibleError: the weights are in the format of another library.
    """
    files = [name for name in names if name.endswith((".safetensors", ".bin", ".json", ".model"))]
    for name in files:
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise StorageError(
                f"{folder / name} is a link to a file that is not there",
                next_step="fetch the model again: part of the download was deleted or moved",
            )
        if (folder / name).is_file():
            require_content(folder / name)
    for index, whole in ((INDEX, WEIGHTS), (BIN_INDEX, BIN_WEIGHTS)):
        if index in names:
            _check_index(folder, names, index, whole)
            return
        if whole in names:
            return
    raise _no_weights(folder, names)


def _check_index(folder: Path, names: Sequence[str], index: str, whole: str) -> None:
    """Raise a StorageError unless a folder has all weight files that its index file lists, and no others.

    Args:
        folder: the model's folder.
        names: the names of all files and folders in it.
        index: the name of the index file.
        whole: the name of the file that would have all weights, if there were no index.
    """
    try:
        shards = sorted({str(name) for name in strict_json((folder / index).read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{folder / index} is not an index of weights",
            reasons=[f"{type(error).__name__}: {error}"],
            next_step=f"delete {folder / index}: {whole} is complete without it"
            if whole in names
            else "fetch that file again",
        ) from None
    missing = [name for name in shards if name not in names]
    if whole in names and whole not in shards:
        raise StorageError(
            f"{folder} holds weights twice: {whole}, and an index of other files",
            reasons=[f"{index} names {name}, which is not there" for name in missing[:12]]
            or [f"{index} names {', '.join(shards[:12])}"],
            next_step=f"delete {folder / index}: {whole} is complete without it"
            if missing
            else f"delete {whole} or {index} with its files, whichever is older",
        )
    if missing:
        unfinished = sorted(path.name for path in folder.rglob("*.incomplete"))
        raise StorageError(
            f"{folder} is not completely downloaded: {len(missing)} of {len(shards)} files with weights are missing",
            reasons=[*(f"missing {name}" for name in missing[:12]), *(f"not finished: {n}" for n in unfinished[:4])],
            next_step="run the download again; it continues with the missing files",
        )


def _no_weights(folder: Path, names: Sequence[str]) -> StorageError | UsageError | IncompatibleError:
    """The error for a folder without weights in a supported format; it says what is there instead.

    `names` are the names of all files and folders in it.
    """
    found = [f"found: {', '.join(names[:12])}"]
    parts = [name for name in names if name.endswith(".safetensors") and "-of-" in name]
    if parts:
        return StorageError(
            f"{folder} holds parts of the weights, but not their index {INDEX}",
            reasons=found,
            next_step=f"fetch {INDEX} from the place where the weights were published",
        )
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    if len(others) == 1 and others[0].endswith((".safetensors", ".bin")):
        expected = WEIGHTS if others[0].endswith(".safetensors") else BIN_WEIGHTS
        return UsageError(
            f"the weights in {folder} have the name {others[0]}, expected {expected}",
            next_step=f"if they are the model's weights in transformers' format, rename the file to {expected}",
        )
    for name, library in _OTHER_LIBRARIES.items():
        if name in names:
            return IncompatibleError(
                f"{folder} holds weights for {library} alone ({name})",
                reasons=found,
                next_step="fetch the model's model.safetensors or pytorch_model.bin",
            )
    if any(name == "onnx" or name.endswith(".onnx") for name in names):
        return IncompatibleError(
            f"{folder} holds an ONNX export of a model, whose weights have no names of transformers",
            reasons=found,
            next_step="import the checkpoint that was exported (model.safetensors or pytorch_model.bin)",
        )
    return StorageError(
        f"{folder} is no model: it holds a config, but no weights",
        reasons=found,
        next_step="fetch the weights into the same folder (model.safetensors or pytorch_model.bin)",
    )
