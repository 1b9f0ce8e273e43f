"""Importing: convert a model in another format to a base folder with safetensors."""

import json
from pathlib import Path
from typing import Any

from offsite.config import ImportSpec
from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.model_owner.base_model import family_of, open_base
from offsite.model_owner.bundle_tensors import DTYPES
from offsite.model_owner.importing.onnx import import_onnx
from offsite.model_owner.importing.timm import copy_timm, is_timm
from offsite.model_owner.importing.vision_tower import copy_tower, tower_in
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, PROCESSOR, TOKENIZER_FILES
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, open_checkpoint, write_checkpoint
from offsite.storage.files import require_free, staged_folder, write_stream
from offsite.storage.safetensors_files import copied

_COMPANIONS = (GENERATION_CONFIG, PROCESSOR, *TOKENIZER_FILES, "LICENSE", "LICENSE.txt")


def import_model(source: Path, out: Path, spec: ImportSpec | None = None, progress: Progress = silent) -> Base:
    """Make a base folder from a model: a GGUF or ONNX file, or a folder with safetensors or .bin files.

    From a model of images and texts only the image tower is imported, from an ONNX file the DINOv2 encoder, from a timm
    model its encoder. Safetensors are copied tensor by tensor. GGUF and .bin files are loaded with transformers; for
    .bin it uses torch's weights-only loader, which runs no code.

    Raises:
        UsageError: the source is none of these formats, or `out` is not empty.
        StorageError: the source is incomplete, or `out` cannot be written.
        IncompatibleError: the family is not supported.
    """
    settings = spec or ImportSpec()
    require_free(out)
    with staged_folder(out) as folder:
        if source.is_file() and source.suffix == ".gguf":
            _import_by_transformers(source.parent, folder, settings.dtype or "bf16", progress, gguf=source.name)
        elif source.is_file() and source.suffix == ".onnx":
            progress(Event("reading the model", 0))
            import_onnx(source, folder, DTYPES[settings.dtype or "fp32"], settings.image_size)
        elif (tower := tower_in(source)) is not None:
            copy_tower(source, folder, tower, DTYPES[settings.dtype] if settings.dtype else None)
        elif is_timm(source):
            copy_timm(source, folder, DTYPES[settings.dtype] if settings.dtype else None)
        elif (source / WEIGHTS).is_file() or (source / INDEX).is_file():
            _copy_folder(source, folder, settings, progress)
        elif (source / CONFIG).is_file():
            _import_by_transformers(source, folder, settings.dtype, progress)
        else:
            raise UsageError(
                f"{source} is no model",
                reasons=[f"expected a .gguf or .onnx file, or a folder with {CONFIG} and weights"],
                next_step="name the file or folder that transformers would load",
            )
        open_base(Base(folder))  # raises errors now that packing would raise later
    return Base(out)


def _copy_folder(source: Path, folder: Path, spec: ImportSpec, progress: Progress) -> None:
    progress(Event("copying the weights", 0))
    model = open_base(Base(source))
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    checkpoint = open_checkpoint(source)
    write_checkpoint(folder, [copied(tensor, dtype=dtype) for tensor in checkpoint.tensors.values()])
    config = dict(model.config)
    if spec.dtype:
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = {"bf16": "bfloat16", "fp32": "float32"}[spec.dtype]
    write_stream(folder / CONFIG, [json.dumps(config, indent=1).encode() + b"\n"])
    for name in _COMPANIONS:
        if (source / name).is_file():
            write_stream(folder / name, [(source / name).read_bytes()])


def _import_by_transformers(
    source: Path, folder: Path, dtype: str | None, progress: Progress, gguf: str | None = None
) -> None:
    from offsite.models.hugging_face_calls import quiet

    with quiet():
        _convert(source, folder, dtype, progress, gguf)


def _convert(source: Path, folder: Path, dtype: str | None, progress: Progress, gguf: str | None) -> None:
    from pickle import UnpicklingError
    from struct import error as StructError

    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from offsite.models.hugging_face_calls import LIBRARY_ERRORS
    from offsite.models.loading import loading_problems

    if (source / ADAPTER_CONFIG).exists():
        raise IncompatibleError(
            f"{source} is not a plain checkpoint",
            reasons=[
                f"{ADAPTER_CONFIG} is in the same folder as the weights, and transformers would load that adapter too"
            ],
            next_step="take it out if you know where it comes from",
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is not None:
        _require_gguf()
        options["gguf_file"] = gguf
    progress(Event("reading the model", 0))
    try:
        family = family_of(AutoConfig.from_pretrained(source, **options).to_dict())
        vision = family.vision
        model, info = (AutoModel if vision else AutoModelForCausalLM).from_pretrained(
            source,
            **options,
            dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: "auto"}[dtype],
            attn_implementation="eager",  # overrides the config, which may name a kernel (code) from the hub
            experts_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are listed, not only the first
            **({} if gguf else {"weights_only": True}),
            **(vision.keywords if vision else {}),
        )
        tokenizer = None if vision else AutoTokenizer.from_pretrained(source, **options)
    except (*LIBRARY_ERRORS, UnpicklingError, StructError, EOFError) as error:
        raise StorageError(
            f"transformers cannot read {source / (gguf or '')}",
            reasons=[f"{type(error).__name__}: {str(error)[:500]}"],
            next_step="check that the file is complete and of a family that transformers supports",
        ) from error
    problems = loading_problems(info, family)
    if problems:
        raise IncompatibleError(
            f"the tensors in {source / (gguf or '')} are not those of its config",
            reasons=first(problems),
            next_step="fetch the model again from where it was published",
        )
    # transformers marks what comes from GGUF as quantised, though the weights are plain by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    progress(Event("writing the weights", 0))
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # raised when the disk is full
        raise StorageError(
            f"cannot write {folder}: {error}", next_step="free some space on that disk or name another one"
        ) from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif (source / PROCESSOR).is_file():
        write_stream(folder / PROCESSOR, [(source / PROCESSOR).read_bytes()])
    _drop_source_names(folder / CONFIG)


def _drop_source_names(file: Path) -> None:
    """Remove the model name that a GGUF file's publisher wrote; a base folder does not need it."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise IncompatibleError(
            "reading a GGUF file needs the package gguf", next_step="pip install 'offsite-tuning[gguf]'"
        ) from None
