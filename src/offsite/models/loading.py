"""Loads a model from its files, ready to run: offline, without foreign code, and with a check of every tensor name."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite.errors import IncompatibleError
from offsite.models.empty_weights import without_weights
from offsite.models.families.architectures import ARCHITECTURES, Architecture
from offsite.models.hugging_face_calls import OFFLINE, incompatible, quiet, require_library
from offsite.models.mixture import experts_implementation
from offsite.models.model_folder import (
    Source,
    as_folder,
    check_settings,
    folder_of,
    has_file,
    model_settings,
    unwrapped_config,
)
from offsite.models.modules.declared import Declared
from offsite.models.tokenizers import load_config
from offsite.models.torch_tensors import read_tensor
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import FLOATS, StoredTensor
from offsite.storage.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_GENERATION_CONFIG = "generation_config.json"
_SMALL = 2**26  # values of a model that is small enough whatever its files hold
_LISTED = 6  # tensors that an error lists


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tensors: Mapping[str, StoredTensor] | None = None,
) -> "PreTrainedModel":
    """Load a causal language model, or a vision encoder without any head, in eval mode and frozen.

    Args:
        source: a plain checkpoint: the folder of a base, bundle or merged plug-in, or a snapshot of its verified files.
            Loading removes the tensors from the snapshot's memory.
        dtype: the dtype of all weights.
        device: the device of the loaded model.
        tensors: the source's tensors, by name, if the caller has opened them already; None opens them.

    Raises:
        UsageError: the folder is not a checkpoint.
        StorageError: the weights are missing, truncated or malformed.
        VerificationError: a file was read again, and has changed since it was verified.
        IncompatibleError: the folder asks for foreign code, contains an adapter, or its tensors are not exactly the
            model's; every missing, unexpected and mismatched tensor is listed.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    family = ARCHITECTURES.get(str(model_settings(source).get("model_type")))
    auto = AutoModel if family is not None and family.vision else AutoModelForCausalLM
    keywords = family.vision.keywords if family is not None and family.vision else {}
    return _load(auto, source, dtype, device, keywords, tensors)


def load_classifier(source: Source, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load an image classifier, such as a merged plug-in, in eval mode and frozen; raises as `load_model`."""
    from transformers import AutoModelForImageClassification

    return _load(AutoModelForImageClassification, source, dtype, device, {})


def encoder_keywords(family: Architecture, config: "PretrainedConfig") -> dict[str, Any]:
    """The arguments, other than config keys, with which transformers builds an encoder without its head."""
    keywords = family.vision.keywords if family.vision else {}
    return {key: value for key, value in keywords.items() if not hasattr(config, key)}


def _load(
    auto: Any,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    keywords: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor] | None = None,
) -> "PreTrainedModel":
    """Load a checkpoint by transformers' class `auto`, or by its declaration of modules, and check its tensors.

    `keywords` are additional config values and arguments for transformers; other arguments as for `load_model`.
    """
    check_settings(source)
    config, declared = unwrapped_config(source)
    require_library(ARCHITECTURES.get(str(config.get("model_type"))), folder_of(source))
    if declared:
        return _load_declared(source, config, declared, tensors, dtype=dtype, device=device)
    how = {
        "dtype": dtype,
        "experts_implementation": experts_implementation(),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # so that all mismatches are listed; else the first one is raised
    }
    if tensors is not None or isinstance(source, Snapshot):
        held = tensors if tensors is not None or isinstance(source, Path) else source.take_tensors()
        model, info = _from_tensors(auto, source, held or {}, keywords, how)
    else:
        model, info = _from_folder(auto, source, keywords, how)
    problems = loading_problems(info, ARCHITECTURES.get(model.config.model_type))
    if problems:
        raise IncompatibleError(
            f"the tensors in {folder_of(source)} are not those of its config",
            reasons=problems,
            next_step="fetch the checkpoint again; if it came from the other party, ask for it again",
        )
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # turns off an additional loss of the router, which is not used here
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    _require_finite(loaded, source)
    return loaded


def _require_finite(model: torch.nn.Module, source: Source) -> None:
    """Refuse weights from the other party (a snapshot) with NaN or infinity, for which training could only diverge.

    Raises:
        IncompatibleError: some tensors are not finite; each is listed.
    """
    if not isinstance(source, Snapshot):
        return
    floats = ((name, value) for name, value in model.state_dict().items() if value.is_floating_point())
    bad = [name for name, value in floats if value.numel() and not torch.stack(value.aminmax()).isfinite().all()]
    if bad:
        raise IncompatibleError(
            f"the weights in {source.folder} hold NaN or infinity",
            reasons=[f"{name} is not finite" for name in bad[:_LISTED]],
            next_step="ask the party that it came from for it again",
        )


def _from_folder(
    auto: Any, folder: Path, keywords: Mapping[str, Any], how: Mapping[str, Any]
) -> tuple["PreTrainedModel", Mapping[str, Any]]:
    """Load a model from a folder; return it with transformers' loading info, which lists tensors that do not match.

    Args:
        auto: a class of transformers such as `AutoModelForCausalLM`.
        folder: the model's folder.
        keywords: config values, and other arguments that depend on the family.
        how: the arguments that are the same for every family, such as the dtype.
    """
    open_checkpoint(folder)  # transformers' own message for a truncated file names no file
    with quiet(), incompatible(folder):
        config, others = _config_with(keywords, folder)
        attention = attention_of(config)
        model, info = auto.from_pretrained(
            folder, config=config, attn_implementation=attention, **how, **OFFLINE, **others, use_safetensors=True
        )
    return model, info


def _config_with(keywords: Mapping[str, Any], source: Source) -> tuple["PretrainedConfig", dict[str, Any]]:
    """Load a config, and set the keyword arguments that are keys of it; return it and the remaining arguments."""
    config = load_config(source)
    known = {name for name in keywords if hasattr(config, name)}
    for name in known:
        setattr(config, name, keywords[name])
    return config, {name: value for name, value in keywords.items() if name not in known}


def _from_tensors(
    auto: Any,
    source: Source,
    tensors: Mapping[str, StoredTensor],
    keywords: Mapping[str, Any],
    how: Mapping[str, Any],
) -> tuple["PreTrainedModel", Mapping[str, Any]]:
    """Load a model from stored tensors, such as a snapshot's verified ones; return it with transformers' loading info.

    Each tensor's memory is released after its use, if nothing else refers to it. Other arguments as for `_from_folder`.
    """
    from transformers import GenerationConfig

    with as_folder(source) as folder, quiet(), incompatible(folder_of(source)):
        config, others = _config_with(keywords, source)
        if has_file(source, _GENERATION_CONFIG):
            how = {**how, "generation_config": GenerationConfig.from_pretrained(folder)}
        model_class = auto._model_mapping[type(config)]  # as `auto.from_pretrained` does, which needs a folder
        if isinstance(source, Snapshot) and str(config.model_type) not in ARCHITECTURES:
            _require_in_proportion(model_class, config, source)
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: Lazy(tensor) for name, tensor in tensors.items()},
            attn_implementation=attention_of(config),
            **how,
            **others,
        )
    return model, info


def _require_in_proportion(model_class: Any, config: "PretrainedConfig", snapshot: Snapshot) -> None:
    """Refuse a config that makes a model much larger than the tensors in the files, before memory is taken for it.

    The table of families limits each value; of a declared family it is not known which values cost memory.

    Raises:
        IncompatibleError: parameters and buffers have over twice as many values as the files, and over 64 Mi.
    """
    with torch.device("meta"), without_weights(buffers=False):
        model = model_class._from_config(copy.deepcopy(config))
    made = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(tensor.shape) for tensor in snapshot.checkpoint().tensors.values())
    if made > max(2 * held, _SMALL):
        raise IncompatibleError(
            f"the config in {snapshot.folder} makes a model that is larger than its tensors",
            reasons=[f"{made:,} values, the files hold {held:,}"],
            next_step="ask the party that it came from for it again",
        )


class Lazy:
    """A value of a state dict: its tensor is read when transformers calls `lazy[...]`, which works only once."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor: StoredTensor | None = tensor

    def __getitem__(self, _: object) -> torch.Tensor:
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            raise RuntimeError("a tensor was taken twice")
        return read_tensor(tensor)


def loading_problems(info: Mapping[str, Any], family: Architecture | None) -> list[str]:
    """A message for each missing, unexpected or mismatched tensor in transformers' loading info.

    With a `family` from the table, unexpected tensors that it knows as buffers are not reported; None reports all.
    """
    problems = [f"missing tensor {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"unexpected tensor {name}" for name in sorted(info["unexpected_keys"]) if not family or family.name_of(name)
    ]  # masks and frequencies in older files are not reported
    problems += [f"mismatched tensor {_mismatch(entry)}" for entry in sorted(info["mismatched_keys"], key=str)]
    return problems + [str(message) for message in info.get("error_msgs") or ()]


def _load_declared(
    source: Source,
    config: dict[str, Any],
    declared: Declared,
    opened: Mapping[str, StoredTensor] | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> "PreTrainedModel":
    """Load a bundle whose emulator has modules that transformers does not have, such as quantised linear layers.

    `opened` has the source's tensors, by name; None opens them.
    """
    from transformers import AutoConfig

    from offsite.models.modules.build_declared import build

    held: dict[str, StoredTensor] = {**(opened or {})}
    if opened is None:
        held |= source.take_tensors() if isinstance(source, Snapshot) else open_checkpoint(source).tensors
    tensors = {}
    for name in list(held):
        tensor = held.pop(name)  # so that at most one tensor is in memory twice
        tensors[name] = read_tensor(tensor, dtype if tensor.dtype in FLOATS else None)
    with quiet(), incompatible(folder_of(source)):
        attention = attention_of(AutoConfig.for_model(**config))
        model, problems = build(config, declared, tensors, attention)
    if problems:
        raise IncompatibleError(
            f"the tensors in {folder_of(source)} are not those of its config",
            reasons=problems,
            next_step="ask the party that it came from for it again",
        )
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    _require_finite(loaded, source)
    return loaded


def attention_of(config: "PretrainedConfig") -> str:
    """The attention implementation for a model: "sdpa", or "eager" if its class lacks SDPA or caps attention logits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_MAPPING.get(type(config), None)
    capped = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(family, "_supports_sdpa", True) and not capped else "eager"


def _mismatch(entry: object) -> str:
    """An entry of the list `mismatched_keys` in transformers' loading info, as text."""
    if isinstance(entry, tuple) and len(entry) == 3:
        name, found, expected = entry
        return f"{name}: found shape {list(found)}, expected {list(expected)}"
    return str(entry)
