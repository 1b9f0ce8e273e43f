"""Imports, with transformers, weights in .bin files and quantised weights, which are dequantised when loaded."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import TYPE_CHECKING, Any

from offsite.config import Dtype
from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, StorageError
from offsite.model_owner.base_model import family_of
from offsite.model_owner.importing.quantised_source import dequantising, tensors_in
from offsite.model_owner.importing.write_weights import require_finite
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, OFFLINE, quiet
from offsite.models.tokenizers import require_tokenizer_package
from offsite.protocol.contents import CONFIG, PROCESSOR
from offsite.storage.files import write_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from offsite.models.families.architectures import Architecture

_ERRORS = (*LIBRARY_ERRORS, UnpicklingError, StructError, EOFError)


def import_by_transformers(source: Path, folder: Path, dtype: Dtype | None, method: str | None) -> None:
    """Load the model in a folder with transformers and write it as a base folder.

    Args:
        source: a folder with a config and .bin files or quantised safetensors.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights; None keeps the checkpoint's own.
        method: key of the quantisation method in configs, such as "fp8"; None if the weights are not quantised, even if
            the config says so.

    Raises:
        StorageError: transformers cannot read the files, or the disk is full.
        IncompatibleError: the family is not supported, tensors are missing, unused or of another shape, or values are
            not finite.
    """
    with quiet():
        load_and_save(source, folder, dtype, method=method)


def load_and_save(
    source: Path, folder: Path, dtype: Dtype | None, *, method: str | None = None, **options: Any
) -> "PreTrainedModel":
    """Load a model with transformers, check that every tensor was used, and write it as a base folder.

    Args:
        source: the folder with the model's files.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights; None keeps the checkpoint's own.
        method: key of the quantisation method in configs; None if the weights are not quantised, or are in a GGUF file.
        options: further arguments of `from_pretrained`, for model and tokenizer alike, such as `gguf_file`.

    Returns:
        The model, with the weights that were written.

    Raises:
        StorageError: as for `import_by_transformers`.
        IncompatibleError: as for `import_by_transformers`.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from offsite.models.loading import loading_problems

    file = source / str(options.get("gguf_file", ""))
    config = options.pop("config", None)
    try:
        if config is None:
            config = AutoConfig.from_pretrained(source, **OFFLINE, **options)
        if method is None and hasattr(config, "quantization_config"):
            del config.quantization_config
        family = family_of(config.to_dict())
        vision = family.vision
        model, info = (AutoModel if vision else AutoModelForCausalLM).from_pretrained(
            source,
            config=config,
            dtype={"bf16": torch.bfloat16, "fp32": torch.float32, None: "auto"}[dtype],
            attn_implementation="eager",  # overrides the config, which may name a kernel (code) from the hub
            experts_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are listed, not only the first
            **OFFLINE,
            **options,
            **(dequantising(method) if method else {}),
            **({} if options.get("gguf_file") else {"weights_only": True}),
            **(vision.keywords if vision else {}),
        )
        if method == "bitsandbytes":
            model = model.dequantize(dtype=model.dtype)
        if method is not None or "gguf_file" in options:  # else saving undoes the conversions of quantised weights
            vars(model).pop("_weight_conversions", None)
        if not vision and "gguf_file" not in options:
            require_tokenizer_package(source)
        tokenizer = None if vision else AutoTokenizer.from_pretrained(source, **OFFLINE, **options)
    except _ERRORS as error:
        raise StorageError(
            f"transformers cannot read {file}",
            reasons=[f"{type(error).__name__}: {str(error)[:500]}"],
            next_step="check that the file is complete and of a family that transformers supports",
        ) from error
    problems = loading_problems(info, family)
    if problems:
        raise IncompatibleError(
            f"the tensors in {file} are not those of its config",
            reasons=first(problems),
            next_step="fetch the model again from where it was published",
        )
    if "gguf_file" not in options:
        _require_used(model, family, source)
    bad = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    require_finite(bad, file)
    _save(model, tokenizer, source, folder)
    loaded: PreTrainedModel = model
    return loaded


def _require_used(model: "PreTrainedModel", family: "Architecture", source: Path) -> None:
    """Raise an error if transformers skipped weights that the model's `_keys_to_ignore_on_load_unexpected` lists.

    Raises:
        IncompatibleError: weights were ignored; at most 20 are listed.
    """
    patterns = [re.compile(pattern) for pattern in type(model)._keys_to_ignore_on_load_unexpected or ()]
    unused = [
        name
        for name, _ in tensors_in(source)
        if (today := family.name_of(name)) is not None
        and family.sizes_of(today) is None
        and any(one.search(name) for one in patterns)
    ]
    if unused:
        raise IncompatibleError(
            f"transformers leaves out tensors of {source} that are weights",
            reasons=first([f"unused tensor {name}" for name in sorted(unused)]),
            next_step="use a checkpoint without these parts",
        )


def _save(model: "PreTrainedModel", tokenizer: Any, source: Path, folder: Path) -> None:
    """Write model and tokenizer to a folder; without a tokenizer, copy the image processor's settings from `source`."""
    from safetensors import SafetensorError

    # transformers marks what comes from GGUF as quantised, though the weights are plain by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
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
    """Remove `_model_name_or_path` from a config file, a name that a GGUF file's publisher chose."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
