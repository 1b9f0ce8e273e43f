"""A folder -> a runnable model: only from this disk, no foreign code, and every key accounted for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite.errors import IncompatibleError
from offsite.models.architectures import ARCHITECTURES, Architecture
from offsite.models.library_calls import OFFLINE, incompatible, quiet, require_library
from offsite.models.mixture import experts_implementation
from offsite.models.model_folder import check_folder, model_settings, unwrapped_config
from offsite.models.modules.declared import Declared
from offsite.models.torch_tensors import read_tensor
from offsite.storage.safetensors_files import FLOATS, open_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a causal language model, or a vision encoder without any head, in eval mode and frozen.

    Args:
        folder: a plain checkpoint: base, bundle or merged plug-in.
        dtype: of all its weights.
        device: where it goes.

    Raises:
        UsageError: the folder is no checkpoint.
        StorageError: the weights are missing, truncated or malformed.
        IncompatibleError: the folder asks for foreign code, holds an adapter, or its tensors are not exactly the
            model's; every missing, unexpected and mismatched key is listed.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    family = ARCHITECTURES.get(str(model_settings(folder).get("model_type")))
    auto = AutoModel if family is not None and family.vision else AutoModelForCausalLM
    return _load(auto, folder, dtype, device, family.vision.keywords if family is not None and family.vision else {})


def load_classifier(folder: Path, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load an image classifier, such as a merged plug-in, in eval mode and frozen; raises as `load_model`."""
    from transformers import AutoModelForImageClassification

    return _load(AutoModelForImageClassification, folder, dtype, device, {})


def encoder_keywords(family: Architecture, config: "PretrainedConfig") -> dict[str, Any]:
    """With what transformers builds the encoder alone, beside what its config says."""
    keywords = family.vision.keywords if family.vision else {}
    return {key: value for key, value in keywords.items() if not hasattr(config, key)}


def _load(
    auto: Any, folder: Path, dtype: torch.dtype, device: torch.device, keywords: Mapping[str, Any]
) -> "PreTrainedModel":
    from transformers import AutoConfig

    check_folder(folder)
    config, declared = unwrapped_config(folder)
    require_library(ARCHITECTURES.get(str(config.get("model_type"))), folder)
    if declared:
        return _load_declared(folder, config, declared, dtype=dtype, device=device)
    open_checkpoint(folder)  # transformers' own message for a truncated file names no file
    with quiet(), incompatible(folder):
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention_of(AutoConfig.from_pretrained(folder, **OFFLINE)),
            experts_implementation=experts_implementation(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed instead of the first one raised
            **OFFLINE,
            **keywords,
            use_safetensors=True,
        )
    problems = loading_problems(info, ARCHITECTURES.get(model.config.model_type))
    if problems:
        raise IncompatibleError(
            f"the tensors in {folder} are not those of its config",
            reasons=problems,
            next_step="fetch the checkpoint again; if it came from the other party, ask for it again",
        )
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # a loss of its own, of which nothing here makes use
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def loading_problems(info: Mapping[str, Any], family: Architecture | None) -> list[str]:
    """What transformers left out or made up while it loaded a model, by its loading info."""
    problems = [f"missing tensor {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"unexpected tensor {name}" for name in sorted(info["unexpected_keys"]) if not family or family.name_of(name)
    ]  # beside masks and frequencies in older files
    problems += [f"mismatched tensor {_mismatch(entry)}" for entry in sorted(info["mismatched_keys"], key=str)]
    return problems + [str(message) for message in info.get("error_msgs") or ()]


def _load_declared(
    folder: Path, config: dict[str, Any], declared: Declared, *, dtype: torch.dtype, device: torch.device
) -> "PreTrainedModel":
    """A bundle whose emulator has modules that transformers does not know."""
    from transformers import AutoConfig

    from offsite.models.modules.build import build

    held = open_checkpoint(folder).tensors
    tensors = {name: read_tensor(tensor, dtype if tensor.dtype in FLOATS else None) for name, tensor in held.items()}
    with quiet(), incompatible(folder):
        attention = attention_of(AutoConfig.for_model(**config))
        model, problems = build(config, declared, tensors, attention)
    if problems:
        raise IncompatibleError(
            f"the tensors in {folder} are not those of its config",
            reasons=problems,
            next_step="ask the party that it came from for it again",
        )
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded


def attention_of(config: "PretrainedConfig") -> str:
    """SDPA, or the plain one where the family has no other, as under a cap on attention's logits."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or MODEL_MAPPING.get(type(config), None)
    capped = getattr(config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(family, "_supports_sdpa", True) and not capped else "eager"


def _mismatch(entry: object) -> str:
    if isinstance(entry, tuple) and len(entry) == 3:
        name, found, expected = entry
        return f"{name}: found shape {list(found)}, expected {list(expected)}"
    return str(entry)
