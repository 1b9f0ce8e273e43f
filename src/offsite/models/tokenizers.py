"""Loads a model's tokenizer, its config, and its context length from its files."""

import importlib.util
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from offsite.errors import IncompatibleError, UsageError
from offsite.models.hugging_face_calls import OFFLINE, incompatible, quiet
from offsite.models.model_folder import (
    Source,
    as_folder,
    check_settings,
    folder_of,
    has_file,
    read_bytes,
    unwrapped_config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_INFINITY = {"Infinity": math.inf, "-Infinity": -math.inf}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a token in base64, and its rank


def load_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model.

    Raises:
        UsageError: a package that reads the tokenizer's file is not installed.
        IncompatibleError: there is no tokenizer, it asks for foreign code, or it has no end token.
    """
    from transformers import AutoTokenizer

    check_settings(source)
    require_tokenizer_package(source)
    with as_folder(source) as folder, quiet(), incompatible(folder_of(source)):
        more = {"config": load_config(source)} if unwrapped_config(source)[1] else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **more, **OFFLINE)
    if tokenizer.eos_token_id is None:
        raise IncompatibleError(
            f"the tokenizer in {folder_of(source)} has no end token, so no answer could ever end",
            next_step='name one as "eos_token" in its tokenizer_config.json',
        )
    return tokenizer


def require_tokenizer_package(source: Source) -> None:
    """Raise an error if tokenizer.model is the only tokenizer file, and a package that reads it is missing.

    transformers reads such a file with sentencepiece; where that is missing it asks for tiktoken, whose files have the
    same name and are text.

    Raises:
        UsageError: a package is not installed; the advice in the error names it.
    """
    if has_file(source, "tokenizer.json") or not has_file(source, "tokenizer.model"):
        return
    ranks = _TIKTOKEN.match(read_bytes(source, "tokenizer.model"))
    kind = "tiktoken" if ranks else "SentencePiece"
    packages = {"tiktoken": "tiktoken"} if ranks else {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in packages.items() if not _is_installed(module)]
    if missing:
        raise UsageError(
            f"{folder_of(source) / 'tokenizer.model'} is a tokenizer of {kind}, whose package is not installed",
            reasons=[f"{package} is not installed" for package in missing],
            next_step=f"pip install {' '.join(missing)}",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def context_length(source: Source) -> int | None:
    """The model's number of positions, which limits a row in tokens; None if its config does not say it."""
    check_settings(source)
    with quiet(), incompatible(folder_of(source)):
        config = load_config(source)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_config(source: Source) -> "PretrainedConfig":
    """Load a model's config as a transformers object; for a bundle that declares modules, the config of its family.

    Settings of quantisation are left out: weights are read as they are stored, and must be plain.
    """
    from transformers import AutoConfig

    config, declared = unwrapped_config(source)
    if declared:
        return make_config(config)
    with as_folder(source) as folder:
        loaded = cast("PretrainedConfig", AutoConfig.from_pretrained(folder, **OFFLINE))
    if hasattr(loaded, "quantization_config"):
        del loaded.quantization_config
    return loaded


def make_config(settings: Mapping[str, Any]) -> "PretrainedConfig":
    """Make a transformers config from the content of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: PretrainedConfig = CONFIG_MAPPING[settings["model_type"]].from_dict(_with_infinity(dict(settings)))
    return made


def _with_infinity(value: Any) -> Any:
    """Replace {"__float__": "Infinity"}, by which transformers writes infinity to JSON, by the number, at any depth."""
    if isinstance(value, dict):
        found = _INFINITY.get(str(value.get("__float__"))) if value.keys() == {"__float__"} else None
        return {key: _with_infinity(one) for key, one in value.items()} if found is None else found
    return [_with_infinity(one) for one in value] if isinstance(value, list) else value
