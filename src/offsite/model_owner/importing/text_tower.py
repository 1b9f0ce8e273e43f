"""Imports the language model of a multi-modal checkpoint: its tensors, its config and the tokenizer's files.

For texts without pictures or sound, the base computes the same as the multi-modal model. The import record has the name
of every tensor in the source, so `offsite plug-in --whole` can write a tuned copy of the multi-modal checkpoint.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.errors import IncompatibleError, StorageError
from offsite.model_owner.base_model import family_of
from offsite.model_owner.importing.import_record import ImportRecord, Place, count_by_part
from offsite.model_owner.importing.write_weights import write_weights
from offsite.models.families.architectures import ARCHITECTURES, Architecture
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, OFFLINE, quiet
from offsite.models.quantisation import plain_config
from offsite.protocol.contents import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.files import write_stream
from offsite.storage.safetensors_files import FLOATS, TensorRange, copied
from offsite.storage.strict_json import strict_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PARTS = ("text_config", "llm_config", "language_config", "vision_config", "audio_config", "thinker_config")
# Language models that compute on texts alone what an ordinary family computes.
_SAME_ON_TEXTS = {
    "qwen2_vl_text": "qwen2",  # rotary positions in three axes, which are equal in a text
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "mllama_text_model": "llama",  # its cross-attention layers are skipped without pictures
}
_AXES = ("mrope_section", "mrope_interleaved")
# Multi-modal models whose classes in transformers do not multiply logits by the language model's logit_scale.
_WITHOUT_SCALE = ("aya_vision", "cohere2_vision")
# Names of the language model's tensors in files of several years; the group is the name within the body or the head.
_HEAD = re.compile(r"(?:thinker\.)?(?:(?:model\.)?(?:language_model|text_model)\.)?lm_head\.(.+)")
_BODIES = (
    re.compile(r"(?:thinker\.)?(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(.+)"),
    re.compile(r"(?:thinker\.)?model\.((?:layers|embed_tokens|norm)\..+)"),
)
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"  # the latter of processors, until 2025


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config is multi-modal: it nests configs of parts, and its type has no row in the architecture table."""
    nested = any(isinstance(config.get(key), dict) for key in _PARTS)
    return nested and str(config.get("model_type")) not in ARCHITECTURES


def copy_text_tower(source: Path, folder: Path, dtype: str | None) -> ImportRecord:
    """Write the language model of a multi-modal model as a base folder.

    Args:
        source: a folder with config, safetensors and the tokenizer's files.
        folder: an existing folder, which becomes the base folder.
        dtype: dtype of the written weights, "BF16" or "F32"; None keeps the source's dtype.

    Returns:
        The record of the import, with the name of every tensor in the source.

    Raises:
        IncompatibleError: transformers does not know the model, or its language model is not supported.
        StorageError: the files are damaged.
    """
    with quiet():
        whole = _whole_config(source)
        text = whole.get_text_config(decoder=True)
        config = _text_config(source, whole, text)
        held = open_checkpoint(source).tensors
        family = family_of(config, [name for name in map(_name_in_tower, held) if name is not None])
        places = {}
        for stored in held.values():
            place = _place_of(stored, family, text)
            if place is not None:
                places[place[0]] = place[1]
    tensors = [copied(tensor, name=name, dtype=dtype) for name, tensor in places.items()]
    if family.head in places and not config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    write_weights(folder, tensors, source)
    if dtype:
        config["dtype"] = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    write_stream(folder / CONFIG, [json.dumps(config, indent=1).encode() + b"\n"])
    _copy_texts_files(source, folder)
    used = {tensor.name: tensor for tensor in places.values()}
    return ImportRecord(
        notes=(f"the language model of a multi-modal model of type {whole.model_type}", *_scale_note(whole, config)),
        left_out=count_by_part(name for name in held if name not in used),
        tower_of=str(whole.model_type),
        tensors={
            name: Place(t.name, t.shape[0] if t.shape != held[t.name].shape else None) for name, t in places.items()
        },
    )


def _scale_note(whole: "PretrainedConfig", config: Mapping[str, Any]) -> tuple[str, ...]:
    """A note that logits of the base are scaled, where transformers leaves this out of the multi-modal model."""
    scale = config.get("logit_scale", 1)
    if whole.model_type not in _WITHOUT_SCALE or scale in (None, 1):
        return ()
    note = f"its logits are multiplied by logit_scale = {scale:g}, as its own class in transformers does it"
    return (f"{note}; the class of {whole.model_type} leaves this out, so losses differ between the two",)


def _whole_config(source: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **OFFLINE)
    except LIBRARY_ERRORS as error:
        raise IncompatibleError(
            f"transformers does not know the multi-modal model in {source}",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:300]}"],
            next_step="fetch the version of the model that transformers loads without code of its own (many publishers "
            "call it -hf)",
        ) from None
    return config


def _text_config(source: Path, whole: "PretrainedConfig", text: "PretrainedConfig") -> dict[str, Any]:
    """The content of the base's config.json.

    Args:
        source: the source's folder, for errors.
        whole: the config of the multi-modal model.
        text: the config of its language model.

    Raises:
        IncompatibleError: transformers has no causal language model of this type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found, kind = text.to_dict(), str(text.model_type)
    if kind in _SAME_ON_TEXTS:
        kind = _SAME_ON_TEXTS[kind]
        rotary = {k: v for k, v in (found.get("rope_parameters") or {}).items() if k not in _AXES}
        known = AutoConfig.for_model(kind).to_dict().keys()
        found = {key: value for key, value in found.items() if key in known} | {"rope_parameters": rotary}
        crossing = getattr(text, "cross_attention_layers", None) or ()
        found["num_hidden_layers"] = text.num_hidden_layers - len(crossing)
        found.pop("model_type", None)
        text = AutoConfig.for_model(kind, **found)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleError(
            f"the language model in {source} is not one that transformers runs alone",
            reasons=[f"it is the part of type {kind!r} of a model of type {whole.model_type!r}"],
            next_step="use a multi-modal model with a language model of a supported type: docs/models.md lists them",
        )
    text.dtype = text.dtype or whole.dtype
    text.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", False) or text.tie_word_embeddings)
    config: dict[str, Any] = json.loads(text.to_json_string())
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    config["tie_word_embeddings"] = text.tie_word_embeddings
    return plain_config(config)


def _name_in_tower(stored: str) -> str | None:
    """The name of a tensor within the language model, from its name in the source; None for a tensor of another part.

    It is "lm_head.weight" for the head; names in the body have no prefix.
    """
    head = _HEAD.fullmatch(stored)
    if head:
        return f"lm_head.{head[1]}"
    return next((found[1] for pattern in _BODIES if (found := pattern.fullmatch(stored))), None)


def _place_of(stored: TensorRange, family: Architecture, text: "PretrainedConfig") -> tuple[str, TensorRange] | None:
    """The name in the base of a tensor of the multi-modal model, and the part of it that the base has.

    None if the tensor does not belong to the language model.
    """
    head = _HEAD.fullmatch(stored.name)
    if head:
        return f"{family.head.rpartition('.')[0]}.{head[1]}", stored
    within = _name_in_tower(stored.name)
    if within is None:
        return None
    name = family.name_of(within)
    place = family.block_of(name) if name else None
    crossing = sorted(getattr(text, "cross_attention_layers", None) or ())
    if name is None or (place is not None and place[0] in crossing):
        return None
    if place is not None and crossing:
        name = family.in_block(place[0] - sum(layer < place[0] for layer in crossing), place[1])
    rows = int(getattr(text, "vocab_size", None) or 0)
    extra = crossing and name in family.embeddings and len(stored.shape) == 2
    if extra and stored.shape[0] > rows > 0 and stored.dtype in FLOATS:
        stored = replace(stored, shape=(rows, *stored.shape[1:]))  # Mllama's image tokens have rows behind the words'
    return name, stored


def _copy_texts_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the generation config, the licence and the chat template to the base folder."""
    for name in (GENERATION_CONFIG, *TOKENIZER_FILES, "LICENSE", "LICENSE.txt"):
        if (source / name).is_file():
            write_stream(folder / name, [(source / name).read_bytes()])
    old = source / _OLD_TEMPLATE
    if not old.is_file() or (folder / _TEMPLATE).exists():
        return
    try:
        template = strict_json(old.read_bytes())["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{old} holds no chat template", reasons=[str(error)], next_step="fetch the file again, or delete it"
        ) from None
    write_stream(folder / _TEMPLATE, [str(template).encode()])
