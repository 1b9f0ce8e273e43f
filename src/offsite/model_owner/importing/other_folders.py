"""Raises errors for folders that look like models but cannot be imported, such as adapters and bundles. Torch-free."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError, UsageError
from offsite.protocol.contents import ADAPTER_CONFIG, CONFIG
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import read_unverified

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".pth")


def refuse_other_folders(folder: Path, names: Sequence[str]) -> None:
    """Raise an error if a folder is of a known kind that cannot be imported, or has no config.

    The error names the kind.

    Args:
        folder: the folder that the user named.
        names: the names of all files and folders in it.

    Raises:
        UsageError: the folder is not one model, or is a bundle, return or plug-in; the error names the folder to import
            if there is one.
        IncompatibleError: the folder is a PEFT adapter or a diffusers pipeline.
    """
    if MANIFEST in names:
        _refuse_artifact(folder)
    if ADAPTER_CONFIG in names:
        _refuse_adapter(folder, names)
    if "model_index.json" in names:
        raise IncompatibleError(
            f"{folder} is a diffusers pipeline, which makes images, and no language model",
            reasons=[f"model_index.json names {_text_of(folder / 'model_index.json', '_class_name') or 'a pipeline'}"],
            next_step="import a causal language model or an image encoder",
        )
    if "modules.json" in names and CONFIG not in names:
        inside = _with_config(folder)
        raise UsageError(
            f"{folder} is a sentence-transformers folder, whose model is in a folder inside",
            next_step=f"name that folder: `offsite import {shlex.quote(str(inside[0]))} --out base/`"
            if inside
            else "fetch it again",
        )
    if CONFIG not in names:
        _refuse_without_config(folder, names)


def _refuse_artifact(folder: Path) -> None:
    """Raise a UsageError for a bundle, a return or a plug-in that is an adapter; a merged plug-in can be imported."""
    manifest, quoted = read_unverified(folder), shlex.quote(str(folder))
    if manifest.kind == "plug-in" and manifest.form == "merged":
        return  # an ordinary checkpoint, which may be tuned again
    if manifest.kind == "bundle":
        next_step = f"to tune it: `offsite tune {quoted} --data FILE --out return/`; to import, name the base model"
    elif manifest.kind == "return":
        next_step = f"to use it: `offsite plug-in base/ {quoted} --out plugged/`"
    else:
        next_step = "plug the return in with --as merged, and import that folder"
    raise UsageError(
        f"{folder} is a {'plug-in in the form of an adapter' if manifest.kind == 'plug-in' else manifest.kind}, "
        "expected a model",
        next_step=next_step,
    )


def _refuse_adapter(folder: Path, names: Sequence[str]) -> None:
    """Raise an IncompatibleError for a folder with the config of a PEFT adapter, with or without a model's weights.

    `names` are the names of all files and folders in it.
    """
    whole = CONFIG in names and any(name.endswith(_WEIGHT_SUFFIXES) and "adapter" not in name for name in names)
    if whole:
        raise IncompatibleError(
            f"{folder} is not a plain checkpoint",
            reasons=[
                f"{ADAPTER_CONFIG} is in the same folder as the weights, and transformers would load that adapter too"
            ],
            next_step=f"if the weights are complete without the adapter, move {ADAPTER_CONFIG} out of the folder",
        )
    base = _text_of(folder / ADAPTER_CONFIG, "base_model_name_or_path") or "its base model"
    kind = _text_of(folder / ADAPTER_CONFIG, "peft_type") or "PEFT"
    raise IncompatibleError(
        f"{folder} is a {kind} adapter of PEFT, and no model",
        reasons=[f"it changes {base}"],
        next_step='merge it into its base with PEFT, and import the result: `python -c "from peft import '
        f"AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}').merge_and_unload()"
        ".save_pretrained('merged')\"`; then copy the tokenizer's files into merged/",
    )


def _refuse_without_config(folder: Path, names: Sequence[str]) -> None:
    """Raise a UsageError that says what a folder without a config is; return if it has GGUF or ONNX files.

    `names` are the names of all files and folders in it.
    """
    quoted = shlex.quote(str(folder))
    if "zero_to_fp32.py" in names or "latest" in names:
        raise UsageError(
            f"{folder} is a checkpoint of DeepSpeed, whose weights are in parts for each process",
            next_step=f"join them: `python {quoted}/zero_to_fp32.py {quoted} merged/ --safe_serialization`, and import "
            "merged/ with config.json and the tokenizer's files in it",
        )
    sharded = [name for name in names if name.startswith("pytorch_model_fsdp")] or (
        [folder.name] if ".metadata" in names else []
    )
    if sharded:
        raise UsageError(
            f"{folder} is a checkpoint of FSDP, whose weights are in parts for each process",
            next_step=f"join them: `accelerate merge-weights {shlex.quote(str(folder / sharded[0]))} merged/`, and "
            "import merged/ with config.json and the tokenizer's files in it",
        )
    if "params.json" in names:
        raise UsageError(
            f"{folder} is in the format of its publisher's own code (params.json), and not in transformers' format",
            next_step="fetch the files that transformers loads (config.json and model.safetensors); publishers offer "
            "them in the same folder as these",
        )
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        raise UsageError(
            f"{folder} holds weights, but no {CONFIG}, which says what model they are of",
            reasons=[f"found: {', '.join(names[:12])}"],
            next_step=f"fetch {CONFIG} from the place where the weights were published, into the same folder",
        )
    if any(name.lower().endswith((".gguf", ".onnx")) for name in names):
        return
    inside = _with_config(folder)
    if inside:
        raise UsageError(
            f"{folder} is no model, but holds {'one' if len(inside) == 1 else 'several'} inside",
            reasons=[str(path) for path in inside[:12]],
            next_step=f"name the folder: `offsite import {shlex.quote(str(inside[-1]))} --out base/`",
        )
    raise UsageError(
        f"{folder} is no model",
        reasons=[
            f"expected a .gguf or .onnx file, or a folder with {CONFIG} and weights",
            f"found: {', '.join(names[:12])}",
        ],
        next_step="name the file or folder that transformers would load",
    )


def _with_config(folder: Path) -> list[Path]:
    """The sub-folders with a config.json, in the order of the numbers in their names, such as "checkpoint-500"."""
    found = [path for path in folder.iterdir() if path.is_dir() and (path / CONFIG).is_file()]
    return sorted(found, key=lambda path: (int("".join(filter(str.isdigit, path.name)) or 0), path.name))


def _text_of(file: Path, key: str) -> str | None:
    """The string under `key` in a JSON file, for an error message; None if there is no such string."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = content.get(key) if isinstance(content, dict) else None
    return value[:120] if isinstance(value, str) and value else None
