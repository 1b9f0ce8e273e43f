"""Imports the image tower of a model of images and texts, such as CLIP: its tensors and its part of the config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError, StorageError
from offsite.model_owner.importing.import_record import ImportRecord, count_by_part
from offsite.model_owner.importing.write_weights import write_weights
from offsite.models.families.architectures import ARCHITECTURES, Architecture
from offsite.protocol.contents import CONFIG, PROCESSOR
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.files import write_stream
from offsite.storage.safetensors_files import copied
from offsite.storage.strict_json import strict_json


def tower_in(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture table's row for the image tower of a model with this config; None if there is none."""
    kind = config.get("model_type")
    return next((family for family in ARCHITECTURES.values() if family.vision and family.vision.tower_of == kind), None)


def copy_tower(source: Path, folder: Path, family: Architecture, dtype: str | None) -> ImportRecord:
    """Write the image tower of a model of images and texts as a base folder.

    Args:
        source: a folder with config, safetensors and the image processor's settings.
        folder: an existing folder, which becomes the base folder.
        family: the tower's row of the architecture table.
        dtype: dtype of the written weights, "BF16" or "F32"; None keeps the source's dtype.

    Returns:
        The record of the import, with the tensors of the other parts, which were left out.

    Raises:
        IncompatibleError: the config does not describe the tower.
        StorageError: the weights or the image processor's settings are damaged.
    """
    whole: dict[str, Any] = strict_json((source / CONFIG).read_bytes())
    config = whole.get("vision_config")
    if family.vision is None or not isinstance(config, dict):
        raise IncompatibleError(
            f"{source / CONFIG} has no vision_config, so the image tower is not described",
            next_step="import the model again from where it was published",
        )
    start = f"{family.vision.prefix}."
    held = open_checkpoint(source).tensors
    tensors = {
        name: copied(tensor, name=name.removeprefix(start), dtype=dtype)
        for name, tensor in held.items()
        if name.startswith(start) and family.name_of(name) is not None
    }
    write_weights(folder, tensors.values(), source)
    stored = {"BF16": "bfloat16", "F32": "float32"}.get(dtype or "")
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    kept |= {"model_type": family.model_type, "architectures": [family.class_name]}
    kept |= {"dtype": stored or config.get("dtype") or whole.get("dtype") or whole.get("torch_dtype") or "float32"}
    write_stream(folder / CONFIG, [json.dumps(kept, indent=1).encode() + b"\n"])
    if (source / PROCESSOR).is_file():
        write_stream(folder / PROCESSOR, [json.dumps(_processor(source), indent=1).encode() + b"\n"])
    for name in ("LICENSE", "LICENSE.txt"):
        if (source / name).is_file():
            write_stream(folder / name, [(source / name).read_bytes()])
    left_out = count_by_part(name for name in held if name not in tensors)
    return ImportRecord((f"the image tower of a model of type {whole['model_type']}",), left_out)


def _processor(source: Path) -> Any:
    """The image processor's settings, with the name of its class.

    The name is added if the file lacks it: transformers can derive it from the type of the whole model, but not from
    that of the tower.
    """
    try:
        settings = strict_json((source / PROCESSOR).read_bytes())
    except ValueError as error:
        raise StorageError(
            f"{source / PROCESSOR} is not JSON", reasons=[str(error)], next_step="fetch the file again"
        ) from None
    if isinstance(settings, dict) and not settings.keys() & {"image_processor_type", "feature_extractor_type"}:
        settings["image_processor_type"] = processor_class(source)
    return settings


def processor_class(folder: Path) -> str:
    """The name of the image processor class that transformers uses for a folder.

    Raises:
        IncompatibleError: transformers finds no class, or one whose output the model cannot use.
    """
    from offsite.data.pictures.picture_files import load_processor

    name: str = load_processor(folder).settings.to_dict()["image_processor_type"]
    return name
