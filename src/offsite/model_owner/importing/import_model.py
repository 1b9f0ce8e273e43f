"""Imports a model: converts a model in another format to a base folder with safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offsite.config import ImportSpec
from offsite.errors import StorageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.bundle_tensors import DTYPES
from offsite.model_owner.importing.by_transformers import import_by_transformers
from offsite.model_owner.importing.from_hub import download_from_hub, hub_address
from offsite.model_owner.importing.gguf import import_gguf
from offsite.model_owner.importing.import_record import ImportRecord
from offsite.model_owner.importing.locate_source import locate_source
from offsite.model_owner.importing.onnx import import_onnx
from offsite.model_owner.importing.quantised_source import method_of, require_dequantisable, stale_settings
from offsite.model_owner.importing.text_tower import copy_text_tower, is_multimodal
from offsite.model_owner.importing.timm import copy_timm, is_timm
from offsite.model_owner.importing.vision_tower import copy_tower, tower_in
from offsite.model_owner.importing.write_weights import write_weights
from offsite.models.quantisation import display_name, plain_config
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import CONFIG, GENERATION_CONFIG, PROCESSOR, TOKENIZER_FILES
from offsite.protocol.output_place import require_place
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, open_checkpoint
from offsite.storage.files import staged_folder, write_stream
from offsite.storage.safetensors_files import copied
from offsite.storage.strict_json import strict_json

_COMPANIONS = (GENERATION_CONFIG, PROCESSOR, *TOKENIZER_FILES, "LICENSE", "LICENSE.txt")


def import_model(source: Path, out: Path, spec: ImportSpec | None = None, progress: Progress = silent) -> Base:
    """Make a base folder from a model: a GGUF or ONNX file, or a folder with safetensors or .bin files.

    Only one part of some models is imported: of a CLIP-like model the image tower, of a multi-modal language model the
    language model, of an ONNX file the DINOv2 encoder, of a timm model the encoder. Safetensors are copied tensor by
    tensor. GGUF and .bin files are loaded with transformers; for .bin it uses torch's weights-only loader, which runs
    no code. Quantised weights are dequantised if transformers can do that. `read_record` returns what was left out.

    Args:
        source: the file or folder; hub:ORG/NAME downloads the model from the Hugging Face hub first.
        out: the new base folder.
        spec: dtype and image size; None for the defaults.
        progress: receives the progress events.

    Raises:
        UsageError: the source is none of these formats, or `out` is not empty.
        StorageError: the source is incomplete, or `out` cannot be written.
        IncompatibleError: the family or the quantisation is not supported, a tensor or setting of the source would be
            lost, or weights hold NaN or infinity.
    """
    settings = spec or ImportSpec()
    address = hub_address(source)
    require_place(out, None if address else source)
    located = locate_source(download_from_hub(address, progress) if address else source)
    with staged_folder(out) as folder:
        progress(Event("reading the model", 0))
        if located.kind == "gguf":
            record = import_gguf(located.path, folder, settings.dtype or "bf16")
        elif located.kind == "onnx":
            record = import_onnx(located.path, folder, DTYPES[settings.dtype or "fp32"], settings.image_size)
        else:
            record = _import_folder(located.path, folder, settings)
        open_base(Base(folder))  # raises errors now that packing would raise later
        record = ImportRecord((*located.notes, *record.notes), record.left_out, record.tower_of, record.tensors)
        record.write(folder)
    return Base(out)


def _import_folder(source: Path, folder: Path, spec: ImportSpec) -> ImportRecord:
    """Write a base folder from a folder with a config and weights, by the importer for its kind of model."""
    config = _read_config(source / CONFIG)
    method = method_of(source, config)
    stale = stale_settings(source, config) if method is None else None
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    safetensors = (source / WEIGHTS).is_file() or (source / INDEX).is_file()
    if method is not None:
        require_dequantisable(source, method, config)
    if method is not None or not safetensors:
        import_by_transformers(source, folder, spec.dtype, method)
        record = ImportRecord((f"dequantised from {display_name(method)}",) if method else ())
    elif (tower := tower_in(config)) is not None:
        record = copy_tower(source, folder, tower, dtype)
    elif is_timm(config):
        record = copy_timm(source, folder, dtype)
    elif is_multimodal(config):
        record = copy_text_tower(source, folder, dtype)
    else:
        record = _copy_folder(source, folder, plain_config(config), spec)
    notes = (*record.notes, *([stale] if stale else []))
    return ImportRecord(notes, record.left_out, record.tower_of, record.tensors)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}", reasons=[str(error)], next_step="fetch the file again") from error
    if not isinstance(config, dict):
        raise StorageError(f"{file} is not a JSON object", next_step="fetch the file again")
    return config


def _copy_folder(source: Path, folder: Path, config: Mapping[str, Any], spec: ImportSpec) -> ImportRecord:
    """Copy weights, tokenizer and the given config of a folder whose safetensors already are those of a base."""
    open_base(Base(source))  # raises an error if a tensor is missing, unused or of another shape
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    tensors = open_checkpoint(source).tensors.values()
    write_weights(folder, [copied(tensor, dtype=dtype) for tensor in tensors], source)
    written = dict(config)
    if spec.dtype:
        written.pop("torch_dtype", None)  # the older name of the same key
        written["dtype"] = {"bf16": "bfloat16", "fp32": "float32"}[spec.dtype]
    write_stream(folder / CONFIG, [json.dumps(written, indent=1).encode() + b"\n"])
    for name in _COMPANIONS:
        if (source / name).is_file():
            write_stream(folder / name, [(source / name).read_bytes()])
    return ImportRecord()
