"""A folder -> a runnable model: only from this disk, no foreign code, and every key accounted for."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite.errors import IncompatibleError, OffsiteError, StorageError, UsageError
from offsite.extras import require
from offsite.models.architectures import ARCHITECTURES, Architecture, architecture_of
from offsite.models.mixture import experts_implementation, in_files
from offsite.models.modules.bottleneck_layers import insert_bottlenecks
from offsite.models.modules.declared import Declared, unwrapped
from offsite.models.modules.declared_shapes import bottleneck_places, bottleneck_shapes, widths_of
from offsite.storage.safetensors_files import (
    FLOATS,
    TensorRange,
    open_checkpoint,
    read_chunks,
    read_header,
    strict_json,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTED = re.compile(r"\.(lora_[AB]|modules_to_save)\.")  # in names of parameters that PEFT adds
_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Keys by which a config runs foreign code, or has transformers read another file than the checkpoint's.
_FOREIGN_KEYS = frozenset({"auto_map", "custom_pipelines", "transformers_weights", "custom_generate", "kernel_config"})


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

    row = ARCHITECTURES.get(str(model_settings(folder).get("model_type")))
    auto = AutoModel if row is not None and row.vision else AutoModelForCausalLM
    return _load(auto, folder, dtype, device, row.vision.keywords if row is not None and row.vision else {})


def load_classifier(folder: Path, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load an image classifier, such as a merged plug-in, in eval mode and frozen; raises as `load_model`."""
    from transformers import AutoModelForImageClassification

    return _load(AutoModelForImageClassification, folder, dtype, device, {})


def model_settings(folder: Path) -> dict[str, Any]:
    """The config of a model folder that may be loaded.

    Raises:
        UsageError: there is none.
        StorageError: it cannot be read.
        IncompatibleError: the folder asks for foreign code, or holds an adapter.
    """
    _check_folder(folder)
    return _read_settings(folder / "config.json")


def encoder_keywords(row: Architecture, config: "PretrainedConfig") -> dict[str, Any]:
    """With what transformers builds the encoder alone, beside what its config says."""
    keywords = row.vision.keywords if row.vision else {}
    return {key: value for key, value in keywords.items() if not hasattr(config, key)}


def _load(
    auto: Any, folder: Path, dtype: torch.dtype, device: torch.device, keywords: Mapping[str, Any]
) -> "PreTrainedModel":
    from transformers import AutoConfig

    _check_folder(folder)
    config, declared = _config_of(folder)
    require_library(ARCHITECTURES.get(str(config.get("model_type"))), folder)
    if declared:
        return _load_declared(folder, config, declared, dtype=dtype, device=device)
    open_checkpoint(folder)  # transformers' own message for a truncated file names no file
    with quiet(), _incompatible(folder):
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention_of(AutoConfig.from_pretrained(folder, **_OFFLINE)),
            experts_implementation=experts_implementation(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed instead of the first one raised
            **_OFFLINE,
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


def require_library(row: Architecture | None, folder: Path) -> None:
    """Import the optional package that the models of a family are made by, where there is one.

    Raises:
        UsageError: it is not installed.
        IncompatibleError: it cannot be imported.
    """
    if row is not None and row.vision is not None and row.vision.extra:
        with _incompatible(folder):  # torchvision beside another torch fails otherwise than by being absent
            require(row.vision.extra, row.vision.extra, f"a model of type {row.model_type}")


def loading_problems(info: Mapping[str, Any], row: Architecture | None) -> list[str]:
    """What transformers left out or made up while it loaded a model, by its loading info."""
    problems = [f"missing tensor {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"unexpected tensor {name}" for name in sorted(info["unexpected_keys"]) if not row or row.name_of(name)
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
    with quiet(), _incompatible(folder):
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


def _config_of(folder: Path) -> tuple[dict[str, Any], Declared | None]:
    """The family's config of a folder, and what its emulator declares."""
    try:
        return unwrapped(_read_settings(folder / "config.json"))
    except ValueError as problem:
        raise IncompatibleError(
            f"{folder} has a config that cannot be read",
            reasons=[str(problem)],
            next_step="ask the party that it came from for it again",
        ) from None


def _loaded_config(folder: Path) -> "PretrainedConfig":
    from transformers import AutoConfig

    config, declared = _config_of(folder)
    loaded: PretrainedConfig
    loaded = AutoConfig.for_model(**config) if declared else AutoConfig.from_pretrained(folder, **_OFFLINE)
    return loaded


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder.

    Raises:
        IncompatibleError: there is none, it asks for foreign code, or it has no end token.
    """
    from transformers import AutoTokenizer

    _check_folder(folder)
    with quiet(), _incompatible(folder):
        given = {"config": _loaded_config(folder)} if _config_of(folder)[1] else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **given, **_OFFLINE)
    if tokenizer.eos_token_id is None:
        raise IncompatibleError(
            f"the tokenizer in {folder} has no end token, so no answer could ever end",
            next_step='name one as "eos_token" in its tokenizer_config.json',
        )
    return tokenizer


def context_length(folder: Path) -> int | None:
    """Positions that the model in a folder has, by its config; None where it does not say."""
    _check_folder(folder)
    with quiet(), _incompatible(folder):
        config = _loaded_config(folder)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_adapted(base: Path, adapter: Path, *, dtype: torch.dtype, device: torch.device) -> "PeftModel":
    """Load a model with a LoRA adapter beside it, and a head in place of its own if one is there; eval mode, frozen.

    Args:
        base: a plain checkpoint.
        adapter: an ordinary PEFT folder, with no module but the head saved whole:
            adapter_config.json and adapter_model.safetensors.
        dtype: of the base's weights and of the adapter's, so that no activation is cast between them.
        device: where it goes.

    Raises:
        UsageError: a folder is no checkpoint or no adapter.
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the adapter is no plain LoRA, or its tensors are not exactly what its config makes on this
            model; every difference is listed.
    """
    from peft import PeftModel

    _check_adapter(adapter, _own_head(base))
    held = {name: tensor.shape for name, tensor in read_header(adapter / ADAPTER_WEIGHTS).items()}
    model = load_model(base, dtype=dtype, device=device)
    with quiet(), _incompatible(adapter):
        adapted = PeftModel.from_pretrained(
            model, str(adapter), is_trainable=False, autocast_adapter_dtype=False, torch_device=str(device)
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
            f"the adapter {adapter} does not fit the model {base}",
            reasons=problems,
            next_step="name the model that the adapter was made for",
        )
    for parameter in adapted.parameters():  # never module.to(dtype): it rounds the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    frozen: PeftModel = adapted.to(device).eval().requires_grad_(False)
    return frozen


def saved_as(parameter: str) -> str:
    """The name in PEFT's files of a parameter of PEFT's."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")


def load_replaced(base: Path, weights: Path, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a model with some of its tensors taken from another file, in eval mode and frozen.

    Args:
        base: a plain checkpoint.
        weights: a safetensors file with tensors of that model by the names of files, such as a full return's.
        dtype: of all weights.
        device: where it goes.

    Raises:
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the file holds what is no tensor of the model, or has another shape; all are listed.
    """
    held = read_header(weights)
    model = load_model(base, dtype=dtype, device=device)
    row = ARCHITECTURES.get(model.config.model_type)
    own = dict(model.named_parameters())
    own = in_files(row, own) if row else own
    problems = [f"unexpected tensor {name}" for name in sorted(held.keys() - own.keys())]
    problems += [
        f"tensor {name}: found shape {list(held[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(held.keys() & own.keys())
        if held[name].shape != tuple(own[name].shape)
    ]
    if problems:
        raise IncompatibleError(
            f"the tensors in {weights} are not those of the model {base}",
            reasons=problems,
            next_step="name the model that they were tuned on",
        )
    with torch.no_grad():
        for name, tensor in held.items():
            own[name].copy_(read_tensor(tensor))
    return model


def load_bottlenecked(base: Path, weights: Path, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a model with bottlenecks in some of its blocks, in eval mode and frozen.

    Args:
        base: a plain checkpoint.
        weights: a safetensors file with the tensors of whole bottlenecks, all of one width.
        dtype: of all weights.
        device: where it goes.

    Raises:
        StorageError: weights are missing, truncated or malformed.
        IncompatibleError: the tensors are not exactly those of bottlenecks behind attention and MLP of blocks that the
            model has; every difference is listed.
    """
    held = {name: tensor.shape for name, tensor in read_header(weights).items()}
    model = load_model(base, dtype=dtype, device=device)
    row = architecture_of(model.config.to_dict())
    hidden, modules = model.config.hidden_size, {name for name, _ in model.named_modules()}
    widths = set(widths_of(held).values())
    blocks = {found[0] for name in held if (found := row.block_of(name))}
    places = [place for place in bottleneck_places(row, sorted(blocks)) if place in modules]
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
            f"the bottlenecks in {weights} do not fit the model {base}",
            reasons=problems or ["the file holds no tensor"],
            next_step="name the model that they were made for",
        )
    own = insert_bottlenecks(model, places, hidden, min(widths))
    with torch.no_grad():
        for name, tensor in read_header(weights).items():
            own[name].copy_(read_tensor(tensor))
    return model.eval().requires_grad_(False)


def read_tensor(tensor: TensorRange, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of a checkpoint on the processor, by plain reads, cast to `dtype` if given.

    Raises:
        StorageError: the file ends early.
    """
    content = bytearray(tensor.size)
    filled = 0
    for chunk in read_chunks(tensor):
        content[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    kind = _TORCH_DTYPES[tensor.dtype]
    flat = torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)
    return flat.reshape(tensor.shape).to(dtype or kind)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and remarks of transformers and PEFT in a block; the user's settings come back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|huggingface_hub)(\..*)?$")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# What transformers and PEFT raise for a config or weights that they cannot make a model of.
LIBRARY_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, IndexError)


@contextlib.contextmanager
def _incompatible(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OffsiteError, MemoryError):
        raise
    except Exception as error:  # a config may be a stranger's, and what a library raises on one has no end
        raise IncompatibleError(
            f"transformers cannot load {folder}",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:500]}"],
            next_step="check that the folder is complete and of a supported model type",
        ) from error


def _check_folder(folder: Path) -> None:
    """Refuse what would run foreign code, reach outside the folder, or silently load something else."""
    config = folder / "config.json"
    if not config.exists():
        tuned = any(folder.glob("*.safetensors"))  # a return, or a plug-in of the form adapter
        raise UsageError(
            f"{folder} holds no config.json, so it is no checkpoint",
            next_step="name a base, bundle or merged plug-in folder"
            + (f"; an adapter goes with its model: `offsite eval MODEL --adapter {folder}`" if tuned else ""),
        )
    settings = _read_settings(config)
    row = ARCHITECTURES.get(str(settings.get("model_type")))
    problems = row.strays(settings) if row else []
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        file = folder / name
        if file.exists():
            problems += [f"{name} has {found}" for found in _foreign(_read_settings(file))]
    if (folder / ADAPTER_CONFIG).exists():
        problems.append(f"{ADAPTER_CONFIG} lies beside the checkpoint, and transformers would load that adapter too")
    if problems:
        raise IncompatibleError(
            f"{folder} is no plain checkpoint",
            reasons=problems,
            next_step="take these out if you know where they come from; models that need their own code do not work",
        )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        content = strict_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {file}", reasons=[str(error)], next_step="fetch the file again") from None
    if not isinstance(content, dict):
        raise StorageError(f"{file} is not a JSON object", next_step="fetch the file again")
    return content


def _foreign(settings: object, path: str = "") -> list[str]:
    found = []
    if isinstance(settings, dict):
        for key, value in settings.items():
            here = f"{path}{key}"
            kernel = "attn_implementation" in key or "experts_implementation" in key
            if key in _FOREIGN_KEYS and value:
                found.append(f"{here}, which runs foreign code or reads other files")
            elif kernel and any(mark in str(value) for mark in "/:\\"):
                found.append(f"{here} = {str(value)[:80]!r}, which fetches foreign code")
            else:
                found += _foreign(value, f"{here}.")
    return found


def _own_head(base: Path) -> list[str]:
    """The module of a model's head, if it is no tied embedding: what an adapter may hold whole."""
    settings = model_settings(base)
    row = ARCHITECTURES.get(str(settings.get("model_type")))
    return [row.head_module] if row is not None and row.head_tensors(settings) else []


def _check_adapter(adapter: Path, saved: list[str]) -> None:
    if not (adapter / ADAPTER_CONFIG).exists():
        raise UsageError(
            f"{adapter} holds no {ADAPTER_CONFIG}, so it is no LoRA adapter",
            next_step="name a return of a LoRA tuning or a plug-in of the form adapter",
        )
    config = _read_settings(adapter / ADAPTER_CONFIG)
    problems = [f"{ADAPTER_CONFIG} has {found}" for found in _foreign(config)]
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
            f"{adapter} is no plain LoRA adapter", reasons=problems, next_step="save the adapter as a plain LoRA"
        )


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
