"""Imports a GGUF file with transformers, which dequantises it.

Settings that transformers ignores are written to the config. A setting or tensor that would be lost is an error.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.config import Dtype
from offsite.data.read_rows import first
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.extras import require
from offsite.model_owner.base_model import family_of
from offsite.model_owner.importing import gguf_rotary
from offsite.model_owner.importing.by_transformers import load_and_save
from offsite.model_owner.importing.gguf_settings import carry_settings, unequal_blocks
from offsite.model_owner.importing.import_record import ImportRecord
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, OFFLINE, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_HEAD = "output.weight"
# Architectures of which tests compare the imported base with the model that the file was written from. Of others
# transformers' reader may leave out what llama.cpp's converter changed in the weights.
_VERIFIED = (
    "bloom", "falcon", "gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm"
)  # fmt: skip


def import_gguf(source: Path, folder: Path, dtype: Dtype) -> ImportRecord:
    """Write the model in a GGUF file as a base folder.

    Args:
        source: the file.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights.

    Returns:
        An empty record, as nothing of the file is left out.

    Raises:
        UsageError: the package gguf is not installed; or the file holds an adapter, a projector for images, or only one
            part of a model.
        StorageError: the file is damaged.
        IncompatibleError: the model is not supported, or a setting or tensor of the file would be lost.
    """
    gguf = require("gguf", "gguf", "reading a GGUF file")
    reader = _reader(gguf, source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _require_model(metadata, source)
    names = [tensor.name for tensor in reader.tensors]
    with quiet():
        config = _config(source, metadata, names, _factors(gguf, reader))
        model = load_and_save(source.parent, folder, dtype, gguf_file=source.name, config=config)
        _require_all_used(model, metadata, names, source)
    return ImportRecord()


def _reader(gguf: Any, source: Path) -> Any:
    """Open a GGUF file with the imported package `gguf`; a file that it cannot read raises a StorageError."""
    try:
        return gguf.GGUFReader(str(source))
    except (*LIBRARY_ERRORS, OverflowError) as error:
        raise StorageError(
            f"{source} is not a complete GGUF file",
            reasons=[f"{type(error).__name__}: {str(error)[:300]}"],
            next_step="download the file again",
        ) from None


def _require_model(metadata: Mapping[str, Any], source: Path) -> None:
    """Raise an error unless a GGUF file's metadata describe a complete language model of a supported architecture.

    Raises:
        UsageError: it holds an adapter, a projector for pictures, or one part of a model.
        StorageError: it does not say which architecture it has.
        IncompatibleError: the architecture is not supported.
    """
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind == "adapter":
        raise UsageError(
            f"{source} is a GGUF file of a LoRA adapter, and no model",
            next_step="join it with its base by llama.cpp's `llama-export-lora`, and import the result",
        )
    if kind != "model" or architecture == "clip":
        raise UsageError(
            f"{source} is a GGUF file of type {architecture if kind == 'model' else kind!r}, and no language model",
            reasons=["files called mmproj hold the part for pictures or sound of a multi-modal model"],
            next_step="import the file with the language model in the same folder",
        )
    if int(metadata.get("split.count", 1)) > 1:
        raise UsageError(
            f"{source} is one of {metadata['split.count']} files of a model",
            next_step="join them: "
            f"`llama-gguf-split --merge FIRST-FILE {shlex.quote(str(source.with_name('whole.gguf')))}`",
        )
    if not isinstance(architecture, str):
        raise StorageError(f"{source} does not name its architecture", next_step="download the file again")
    if architecture not in _VERIFIED:
        raise IncompatibleError(
            f"GGUF files of architecture {architecture[:64]!r} are not supported",
            reasons=[f"supported: {', '.join(_VERIFIED)}"],
            next_step="import the safetensors that the file was made from",
        )


def _factors(gguf: Any, reader: Any) -> dict[str, Any]:
    """The file's tensors of rotary frequency factors, dequantised, keyed by name; they become settings, not weights.

    `gguf` is the imported package, `reader` its reader of the file.
    """
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
        for tensor in reader.tensors
        if tensor.name in gguf_rotary.TENSORS
    }


def _config(
    source: Path, metadata: Mapping[str, Any], names: Sequence[str], factors: Mapping[str, Any]
) -> "PretrainedConfig":
    """The transformers config of a GGUF file's model, with every setting of its metadata.

    Args:
        source: the GGUF file.
        metadata: its keys and values.
        names: the names of its tensors.
        factors: its tensors of rotary frequency factors, keyed by name.

    Raises:
        StorageError: transformers cannot read the file or does not know its architecture.
        IncompatibleError: the config has no place for a setting; at most 20 are listed.
    """
    from transformers import AutoConfig

    architecture = str(metadata["general.architecture"])
    _require_known(unequal_blocks(metadata), source)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, **OFFLINE)
    except (*LIBRARY_ERRORS, OverflowError) as error:
        raise StorageError(
            f"transformers cannot read {source}",
            reasons=[f"its architecture is {architecture!r}", f"{type(error).__name__}: {str(error)[:300]}"],
            next_step="import the safetensors that the file was made from",
        ) from error
    family = family_of(config.to_dict())
    config.tie_word_embeddings = _HEAD not in names
    config.pad_token_id = metadata.get("tokenizer.ggml.padding_token_id")  # else that of another model of the class
    for key, path in (("attention_bias", "attn_q.bias"), ("qkv_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if hasattr(config, key):
            setattr(config, key, any(name.endswith(path) for name in names))
    if hasattr(config, "qk_layernorm"):
        config.qk_layernorm = any("attn_q_norm" in name for name in names)
    problems = carry_settings(metadata, config)
    partial = "partial_rotary_factor" in family.config_keys
    problems += gguf_rotary.carry_rotary(metadata, factors, config, partial=partial)
    permuted = architecture == "llama" and f"{architecture}.attention.head_count_kv" not in metadata
    if permuted:
        problems.append("llama.attention.head_count_kv is missing, without which queries and keys are read wrongly")
    _require_known(problems, source)
    return config


def _require_known(problems: Sequence[str], source: Path) -> None:
    """Raise an IncompatibleError if there are messages about settings of the GGUF file that would be lost."""
    if problems:
        raise IncompatibleError(
            f"{source} has settings that would be lost",
            reasons=first(problems),
            next_step="import the safetensors that the file was made from",
        )


def _require_all_used(
    model: "PreTrainedModel", metadata: Mapping[str, Any], names: Sequence[str], source: Path
) -> None:
    """Raise an error if transformers did not load a tensor of the GGUF file into the model.

    Args:
        model: the model that transformers loaded from the file.
        metadata: the file's keys and values.
        names: the names of its tensors.
        source: the file, for the error.

    Raises:
        IncompatibleError: there are such tensors; at most 20 are listed.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = TENSOR_PROCESSORS.get(str(metadata["general.architecture"]), TensorProcessor)
    body = (model.base_model_prefix, _Names(model.base_model))
    used = get_gguf_hf_weights_map(_Names(model, (body,)), kind(config=model.config.to_dict()))
    unused = [
        name for name in names if name not in used and name.removesuffix(".weight") not in used and not _is_buffer(name)
    ]
    if unused:
        raise IncompatibleError(
            f"{source} has tensors that would be lost",
            reasons=first([f"unused tensor {name}" for name in unused]),
            next_step="import the safetensors that the file was made from",
        )


class _Names:
    """Presents a model to `get_gguf_hf_weights_map` with its body as the only child module.

    That function calls itself for each child, and would take seconds for each module of the real model.
    """

    def __init__(self, model: "PreTrainedModel", children: "Sequence[tuple[str, _Names]]" = ()) -> None:
        self.config = model.config
        self.state_dict = model.state_dict
        self.named_children = lambda: children


def _is_buffer(name: str) -> bool:
    """Whether a GGUF tensor is no weight: its values are in the config, or the model computes them itself."""
    return name in gguf_rotary.TENSORS or name.endswith(".attn_rot_embd.weight")
