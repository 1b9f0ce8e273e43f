"""Load a model together with a tuning result: a LoRA adapter, bottlenecks, or new values for some of its tensors."""

import re
from typing import TYPE_CHECKING

import torch

from offsite.errors import IncompatibleError, UsageError
from offsite.models.families.family_of_source import family_of_source
from offsite.models.hugging_face_calls import incompatible, quiet
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from offsite.models.model_folder import (
    ADAPTER_CONFIG,
    Source,
    as_folder,
    folder_of,
    foreign_settings,
    has_file,
    model_settings,
    read_settings,
    tensors_of,
)
from offsite.models.modules.bottleneck_layers import insert_bottlenecks
from offsite.models.modules.declared_shapes import bottleneck_places, bottleneck_shapes, widths_of
from offsite.models.modules.lora_on_compressed import permit_compressed_layers
from offsite.models.torch_tensors import read_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ITS_MODEL = "name the model that the adapter was made for"
ADAPTED = re.compile(r"\.(lora_[AB]|modules_to_save)\.")  # in names of parameters that PEFT adds


def load_adapted(base: Source, adapter: Source, *, dtype: torch.dtype, device: torch.device) -> "PeftModel":
    """Load a frozen model in eval mode with a LoRA adapter, and with the output head in the adapter's folder, if any.

    Args:
        base: a plain checkpoint.
        adapter: an ordinary PEFT folder with adapter_config.json and adapter_model.safetensors; `modules_to_save` may
            list only the output head.
        dtype: the dtype of all weights, of base and adapter, so that no activation is cast between them.
        device: the device of the loaded model.

    Raises:
        UsageError: a folder is not a checkpoint or not an adapter.
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the adapter is not a plain LoRA, or its tensors are not exactly those that its config gives
            for this model; every difference is listed.
    """
    from peft import LoraConfig, PeftModel

    _check_adapter(adapter, _own_head(base))
    held = {name: tensor.shape for name, tensor in tensors_of(adapter, ADAPTER_WEIGHTS).items()}
    model = load_model(base, dtype=dtype, device=device)
    with as_folder(adapter, ADAPTER_WEIGHTS) as folder, quiet(), incompatible(folder_of(adapter), next_step=_ITS_MODEL):
        config = LoraConfig.from_pretrained(str(folder))
        permit_compressed_layers(config)
        adapted = PeftModel.from_pretrained(
            model,
            str(folder),
            is_trainable=False,
            config=config,
            autocast_adapter_dtype=False,
            torch_device=str(device),
            ignore_mismatched_sizes=True,  # so that all mismatches are listed below; else the first one is raised
        )
    expected = {
        saved_as(name): tuple(parameter.shape) for name, parameter in adapted.named_parameters() if ADAPTED.search(name)
    }
    problems = [f"missing tensor {name}" for name in sorted(expected.keys() - held.keys())]
    problems += [f"unexpected tensor {name}" for name in sorted(held.keys() - expected.keys())]
    problems += [
        f"tensor {name}: found shape {list(held[name])}, expected {list(expected[name])}"
        for name in sorted(held.keys() & expected.keys())
        if held[name] != expected[name]
    ]
    if problems:
        raise IncompatibleError(
            f"the adapter {folder_of(adapter)} does not fit the model {folder_of(base)}",
            reasons=problems,
            next_step=_ITS_MODEL,
        )
    for parameter in adapted.parameters():  # never module.to(dtype): it rounds the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    frozen: PeftModel = adapted.to(device).eval().requires_grad_(False)
    return frozen


def saved_as(parameter: str) -> str:
    """The tensor name in PEFT's adapter file of a parameter of the PEFT model (`adapted.named_parameters()`)."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")


def load_replaced(
    base: Source, adapter: Source, weights: str, *, dtype: torch.dtype, device: torch.device
) -> "PreTrainedModel":
    """Load a model in eval mode and frozen, and replace some of its tensors by those in another file.

    Args:
        base: a plain checkpoint.
        adapter: the folder with the other file, such as a return by the method "full".
        weights: the name of that safetensors file; its tensors have the same names as in checkpoint files.
        dtype: the dtype of all weights.
        device: the device of the loaded model.

    Raises:
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the file has tensors that the model does not have, or with other shapes; all are listed.
    """
    held, family = tensors_of(adapter, weights), family_of_source(base)
    model = load_model(base, dtype=dtype, device=device)
    own = in_files(family, dict(model.named_parameters()))
    problems = [f"unexpected tensor {name}" for name in sorted(held.keys() - own.keys())]
    problems += [
        f"tensor {name}: found shape {list(held[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(held.keys() & own.keys())
        if held[name].shape != tuple(own[name].shape)
    ]
    if problems:
        raise IncompatibleError(
            f"the tensors in {folder_of(adapter) / weights} are not those of the model {folder_of(base)}",
            reasons=problems,
            next_step="name the model that they were tuned on",
        )
    with torch.no_grad():
        for name, tensor in held.items():
            own[name].copy_(read_tensor(tensor))
    return model


def load_bottlenecked(
    base: Source, adapter: Source, weights: str, *, dtype: torch.dtype, device: torch.device
) -> "PreTrainedModel":
    """Load a model in eval mode and frozen, with bottleneck adapters in some of its blocks.

    Args:
        base: a plain checkpoint.
        adapter: the folder with the bottlenecks.
        weights: the name of a safetensors file with all tensors of each bottleneck; all bottlenecks have the same
            width.
        dtype: the dtype of all weights.
        device: the device of the loaded model.

    Raises:
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the tensors are not exactly those of bottlenecks after attention and MLP in blocks of this
            model; every difference is listed.
    """
    held = {name: tensor.shape for name, tensor in tensors_of(adapter, weights).items()}
    family = family_of_source(base)
    model = load_model(base, dtype=dtype, device=device)
    hidden, modules = model.config.hidden_size, {name for name, _ in model.named_modules()}
    widths = set(widths_of(held).values())
    blocks = {found[0] for name in held if (found := family.block_of(name))}
    places = [place for place in bottleneck_places(family, sorted(blocks)) if place in modules]
    expected: dict[str, tuple[int, ...]] = {}
    for place in places:
        expected |= bottleneck_shapes(place, hidden, min(widths, default=0))
    problems = [f"missing tensor {name}" for name in sorted(expected.keys() - held.keys())]
    problems += [f"unexpected tensor {name}" for name in sorted(held.keys() - expected.keys())]
    problems += [
        f"tensor {name}: found shape {list(held[name])}, expected {list(expected[name])}"
        for name in sorted(held.keys() & expected.keys())
        if held[name] != expected[name]
    ]
    if problems or not held:
        raise IncompatibleError(
            f"the bottlenecks in {folder_of(adapter) / weights} do not fit the model {folder_of(base)}",
            reasons=problems or ["the file holds no tensor"],
            next_step="name the model that they were made for",
        )
    own = insert_bottlenecks(model, places, hidden, min(widths))
    with torch.no_grad():
        for name, tensor in tensors_of(adapter, weights).items():
            own[name].copy_(read_tensor(tensor))
    return model.eval().requires_grad_(False)


def _own_head(base: Source) -> list[str]:
    """The modules that `modules_to_save` may list: the output head, or none if it is tied to the embedding."""
    settings = model_settings(base)
    family = family_of_source(base)
    return [family.head_module] if family.head_tensors(settings) else []


def _check_adapter(adapter: Source, saved: list[str]) -> None:
    """Check that an adapter's config is that of a plain LoRA; `modules_to_save` may list only the modules `saved`.

    Raises:
        UsageError: the folder has no adapter_config.json.
        IncompatibleError: it is another kind of adapter; all problems are listed.
    """
    if not has_file(adapter, ADAPTER_CONFIG):
        raise UsageError(
            f"{folder_of(adapter)} holds no {ADAPTER_CONFIG}, so it is not a LoRA adapter",
            next_step="name a return of a LoRA tuning or a plug-in of the form adapter",
        )
    config = read_settings(adapter, ADAPTER_CONFIG)
    problems = [f"{ADAPTER_CONFIG} has {found}" for found in foreign_settings(config)]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base's weights")
    if config.get("modules_to_save") not in (None, [], saved):
        expected = f"none or {saved[0]}" if saved else "none"
        problems.append(f"modules_to_save is {str(config['modules_to_save'])[:80]}, expected {expected}")
    wrong = ("auto_mapping", "layer_replication", "megatron_config", "trainable_token_indices")
    problems += [f"{key} is set" for key in wrong if config.get(key)]
    if problems:
        raise IncompatibleError(
            f"{folder_of(adapter)} is no plain LoRA adapter",
            reasons=problems,
            next_step="save the adapter as a plain LoRA",
        )
