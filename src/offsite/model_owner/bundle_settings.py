"""The files of a bundle other than its weights: config, and tokenizer or image processor. Torch-free."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError, StorageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.bundle_tensors import bundle_config
from offsite.model_owner.importing.vision_tower import processor_class
from offsite.models.families.architectures import config_problems
from offsite.models.modules.declared import Declared, wrapped
from offsite.protocol.contents import (
    ALLOWED_KEYS,
    CONFIG,
    GENERATION_CONFIG,
    PROCESSOR,
    TOKENIZER_FILES,
    cleaned,
    content_problems,
)
from offsite.storage.strict_json import strict_json


def settings_files(
    model: BaseModel, kept: Sequence[int], dtype: str, declared: Declared | None = None
) -> dict[str, bytes]:
    """The contents of a bundle's files other than weights, keyed by file name: config, tokenizer or image processor.

    Keys that a bundle may not contain are removed.

    Args:
        model: the opened base.
        kept: base indices of the bundle's blocks, in order.
        dtype: the bundle's dtype of floats, "BF16" or "F32".
        declared: what the config declares of blocks that differ from the family's; None if none does.

    Raises:
        IncompatibleError: a file holds settings that a bundle may not contain.
        StorageError: there is no tokenizer, or a file cannot be read.
    """
    config = bundle_config(model, kept, dtype)
    problems = config_problems(config, model.family)
    if problems:
        raise IncompatibleError(
            "the base's config has content that may not travel",
            reasons=problems,
            next_step=f"correct {model.folder / CONFIG}",
        )
    files = {CONFIG: _json(wrapped(config, declared) if declared else config)}
    others = _input_files(model)
    if model.family.vision is None and (model.folder / GENERATION_CONFIG).is_file():
        others.append(model.folder / GENERATION_CONFIG)
    for source in others:
        files[source.name] = _json(_cleaned_file(source)) if source.name in ALLOWED_KEYS else source.read_bytes()
    return files


def _input_files(model: BaseModel) -> list[Path]:
    """The paths of the tokenizer's files of a language model, or of the image processor's file of an image encoder.

    Raises:
        StorageError: the base folder has no such file.
    """
    if model.family.vision is None:
        return _tokenizer_files(model)
    if not (model.folder / PROCESSOR).is_file():
        raise StorageError(
            f"{model.folder} holds no {PROCESSOR}, without which nobody knows how images are given to the model",
            next_step="copy the image processor's file into the base folder",
        )
    return [model.folder / PROCESSOR]


def _tokenizer_files(model: BaseModel) -> list[Path]:
    found = [model.folder / name for name in TOKENIZER_FILES if (model.folder / name).is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for path in found):
        raise StorageError(
            f"{model.folder} holds no tokenizer, without which the bundle could not be tuned",
            reasons=["expected tokenizer.json, tokenizer.model or vocab.json"],
            next_step="copy the tokenizer's files into the base folder",
        )
    return found


def _cleaned_file(source: Path) -> dict[str, Any]:
    """The content of a JSON file of the base, without the keys that a bundle may not contain.

    Raises:
        StorageError: the file is not JSON.
        IncompatibleError: a remaining value is not permitted in a bundle.
    """
    try:
        content = strict_json(source.read_bytes())
    except ValueError as error:
        raise StorageError(
            f"{source} is not JSON", reasons=[str(error)], next_step="correct the file in the base"
        ) from None
    kept = cleaned(source.name, content) if isinstance(content, dict) else content
    if source.name == PROCESSOR and isinstance(kept, dict) and not kept.get("image_processor_type"):
        kept["image_processor_type"] = processor_class(source.parent)
    problems = content_problems(source.name, kept)
    if problems:
        raise IncompatibleError(
            f"{source} has content that may not travel", reasons=problems, next_step="correct the file in the base"
        )
    return dict(kept)


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
