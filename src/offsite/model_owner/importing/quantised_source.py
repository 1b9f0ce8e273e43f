"""Finds the quantisation method of a folder's weights, and how transformers dequantises them when it loads them."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.model_owner.importing.check_download import BIN_INDEX, BIN_WEIGHTS
from offsite.models.quantisation import FILES, display_name, method_in_settings, method_of_tensors
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS
from offsite.storage.safetensors_files import read_header_bytes
from offsite.storage.strict_json import strict_json

# Methods whose weights transformers dequantises on every machine -> the package that it needs for that, by the names of
# import and of pip.
_DEQUANTISED: Mapping[str, tuple[str, str] | None] = {
    "fp8": None,
    "mxfp8": None,
    "mxfp4": None,
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
}


def method_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The key of the method by which the weights in a folder are quantised, such as "fp8"; None if none are quantised.

    A quantisation config alone does not count: some tools leave it in the config of plain weights.

    Raises:
        StorageError: a file is missing or damaged.
    """
    found = method_of_tensors(tensors_in(folder))
    return found and (method_in_settings(config) or found)


def stale_settings(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A message that left-over quantisation settings of a model in plain weights are removed; None if there are none.

    Call it only for a folder whose weights are not quantised.
    """
    files = [name for name in FILES if (folder / name).is_file()]
    method = method_in_settings(config)
    if method is None and not files:
        return None
    where = ", ".join([*(["config.json"] if method else []), *files])
    return f"left out settings of {display_name(method or 'quantisation')} ({where}): the weights are plain"


def require_dequantisable(folder: Path, method: str, config: Mapping[str, Any]) -> None:
    """Raise an error if transformers cannot dequantise the weights in a folder on this machine.

    Args:
        folder: the model's folder.
        method: the key of the quantisation method, from `method_of`.
        config: the content of the folder's config.json.

    Raises:
        UsageError: a package that the method needs is not installed.
        StorageError: parts of the quantised weights are missing.
        IncompatibleError: transformers does not dequantise this method, or the config has no quantisation settings.
    """
    name = "in an unknown way" if method == "unknown" else f"with {display_name(method)}"
    plain = "import the checkpoint that it was made from, whose weights are plain (hubs link it as the base model)"
    if method not in _DEQUANTISED:
        raise IncompatibleError(
            f"the weights in {folder} are quantised {name}, and transformers does not dequantise them",
            next_step=plain,
        )
    if method_in_settings(config) is None:
        raise IncompatibleError(
            f"the weights in {folder} are quantised {name}, but config.json does not say how",
            reasons=["it has no quantization_config"],
            next_step=plain,
        )
    package = _DEQUANTISED[method]
    if package and importlib.util.find_spec(package[0]) is None:
        raise UsageError(
            f"the weights in {folder} are quantised {name}, which needs a package that is not installed",
            reasons=[f"no module named {package[0]!r}"],
            next_step=f"pip install {package[1]}",
        )
    if method == "mxfp4":
        _require_pairs(folder)


def _require_pairs(folder: Path) -> None:
    """Raise an error if blocks of MXFP4 have no scales, or scales no blocks; transformers does not name them.

    Raises:
        StorageError: there are such tensors; they are listed.
    """
    names = {name for name, _ in tensors_in(folder)}
    pairs = (("_blocks", "_scales"), ("_scales", "_blocks"))
    others = (name.removesuffix(end) + other for name in names for end, other in pairs if name.endswith(end))
    missing = sorted(set(others) - names)
    if missing:
        raise StorageError(
            f"the weights in {folder} are quantised with MXFP4, and parts of them are missing",
            reasons=first([f"missing {name}" for name in missing]),
            next_step="fetch the model again from where it was published",
        )


def dequantising(method: str) -> dict[str, Any]:
    """The keyword arguments with which `from_pretrained` dequantises weights of this quantisation method."""
    import transformers

    configs = {
        "fp8": "FineGrainedFP8Config",
        "mxfp8": "FineGrainedFP8Config",
        "mxfp4": "Mxfp4Config",
        "compressed-tensors": "CompressedTensorsConfig",
    }
    if method not in configs:
        return {}
    return {"quantization_config": getattr(transformers, configs[method])(dequantize=True)}


def tensors_in(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and safetensors dtype of every tensor in the files of a folder; no values are read."""
    for name in _files(folder, INDEX, WEIGHTS):
        yield from _header(folder / name)
    if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        return
    for name in _files(folder, BIN_INDEX, BIN_WEIGHTS):
        yield from _pickled(folder / name)


def _files(folder: Path, index: str, whole: str) -> list[str]:
    """The names of the weight files in a folder: those that an index file lists, else the single file `whole`."""
    if (folder / index).is_file():
        return sorted({str(name) for name in strict_json((folder / index).read_bytes())["weight_map"].values()})
    return [whole] if (folder / whole).is_file() else []


def _header(file: Path) -> list[tuple[str, str]]:
    """The name and dtype of each tensor in a safetensors file, from its header; empty if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            header = strict_json(read_header_bytes(file, stream, file.stat().st_size)[8:])
        return [(str(name), str(entry["dtype"])) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # the reader of the weights reports it


def _pickled(file: Path) -> list[tuple[str, str]]:
    """The name and safetensors dtype of each tensor in a .bin file; empty if torch cannot open it.

    No values are read, and no code of the file runs.
    """
    import torch

    from offsite.models.torch_tensors import TORCH_DTYPES

    kinds = {kind: name for name, kind in TORCH_DTYPES.items()} | {
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"
    }  # fmt: skip
    try:
        held = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return [(str(name), kinds.get(t.dtype, "other")) for name, t in held.items() if isinstance(t, torch.Tensor)]
    except Exception:  # noqa: BLE001 - an older format, or a broken or hostile file: the loader reports it
        return []
