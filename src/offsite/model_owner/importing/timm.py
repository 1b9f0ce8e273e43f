"""Imports the encoder of a model that timm published: weights, config and preprocessing.

The weights are copied. The new config lists all settings. The preprocessing becomes the settings of a Pillow image
processor.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.errors import IncompatibleError
from offsite.model_owner.importing.import_record import ImportRecord, count_by_part
from offsite.model_owner.importing.write_weights import write_weights
from offsite.models.families.timm_family import FORMS, TIMM
from offsite.protocol.contents import CONFIG, PROCESSOR, processor_problems
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.files import write_stream
from offsite.storage.safetensors_files import copied
from offsite.storage.strict_json import strict_json

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config was written by timm, or by the timm wrapper in transformers."""
    return "pretrained_cfg" in config and "architecture" in config


def copy_timm(source: Path, folder: Path, dtype: str | None) -> ImportRecord:
    """Write the encoder of a timm model as a base folder.

    Sizes come from the tensors' shapes, not from the config.

    Args:
        source: a folder with config and safetensors.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights, "BF16" or "F32"; None keeps the source's dtype.

    Returns:
        The record of the import, with the tensors of heads and poolers that were left out.

    Raises:
        IncompatibleError: the model or its preprocessing is not supported.
        StorageError: the weights are damaged.
    """
    published: dict[str, Any] = strict_json((source / CONFIG).read_bytes())
    name = str(published["architecture"])
    if name not in FORMS:
        raise IncompatibleError(
            f"timm's {name[:64]!r} is not supported",
            reasons=[f"supported: {', '.join(sorted(FORMS))}"],
            next_step="use one of these",
        )
    stored = open_checkpoint(source).tensors
    held = {TIMM.name_of(name): tensor for name, tensor in stored.items()}
    tensors = [copied(tensor, name=today, dtype=dtype) for today, tensor in held.items() if today is not None]
    try:
        hidden, _, patch, _ = held["patch_embed.proj.weight"].shape
        grid = math.isqrt(held["pos_embed"].shape[1] - 1)
        inner = held[TIMM.in_block(0, "mlp.fc2.weight")].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise IncompatibleError(
            f"the weights in {source} are not those of {name}",
            reasons=[f"no such tensor, or one of another shape: {error}"],
            next_step="fetch the model again from where it was published",
        ) from None
    given = published.get("model_args")
    heads = given.get("num_heads", FORMS[name].heads) if isinstance(given, dict) else FORMS[name].heads
    config: dict[str, Any] = {
        "model_type": TIMM.model_type,
        "architectures": [TIMM.class_name],
        "architecture": name,
        "hidden_size": hidden,
        "num_hidden_layers": 1 + max(place[0] for today in held if today and (place := TIMM.block_of(today))),
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "image_size": grid * patch,
        "patch_size": patch,
        "dtype": {"BF16": "bfloat16", "F16": "float16"}.get(tensors[0].dtype, "float32"),
    }
    config |= {**TIMM.fixed_settings, **TIMM.computed_settings(config)}
    settings = _processor(published["pretrained_cfg"], config["image_size"])
    write_weights(folder, tensors, source)
    for file, content in ((CONFIG, config), (PROCESSOR, settings)):
        write_stream(folder / file, [json.dumps(content, indent=1).encode() + b"\n"])
    for license_ in ("LICENSE", "LICENSE.txt"):
        if (source / license_).is_file():
            write_stream(folder / license_, [(source / license_).read_bytes()])
    left_out = [name for name in stored if TIMM.name_of(name) is None]
    return ImportRecord((f"the encoder of {name}",), count_by_part(left_out))


def _processor(published: Any, side: int) -> dict[str, Any]:
    """The settings of a Pillow image processor that resizes, crops and normalises as timm does for evaluation.

    Args:
        published: `pretrained_cfg` of the model's config.
        side: the side of the input images in pixels.

    Raises:
        IncompatibleError: a setting is missing or has no counterpart in the image processor; all are listed.
    """
    found = published if isinstance(published, dict) else {}
    share, mode, filter_ = found.get("crop_pct", 0.875), found.get("crop_mode", "center"), found.get("interpolation")
    problems = [f"crop_mode = {str(mode)[:40]!r}, expected 'center'"] if mode != "center" else []
    if filter_ not in _FILTERS:
        problems.append(f"interpolation = {str(filter_)[:40]!r}, expected one of {', '.join(_FILTERS)}")
    if type(share) not in (int, float) or not 0.1 <= share <= 1:
        problems.append(f"crop_pct = {str(share)[:40]!r}, expected a number from 0.1 to 1")
    settings: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": found.get("mean"),
        "image_std": found.get("std"),
    }
    if not problems:
        settings |= {"size": {"shortest_edge": math.floor(side / share)}, "resample": _FILTERS[str(filter_)]}
    problems += processor_problems(settings)
    if problems:
        raise IncompatibleError(
            "the preprocessing that this model was published with is not supported",
            reasons=problems,
            next_step="correct pretrained_cfg in its config.json",
        )
    return settings
