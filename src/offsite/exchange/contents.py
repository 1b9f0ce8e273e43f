"""Which files a bundle may hold, and what may stand in its JSON files. Packing writes by it, verifying refuses by it.

An allow-list, because transformers acts upon many keys: `auto_map` imports code, a hub name as attention
implementation downloads kernels, a tokenizer may name other files.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from offsite.config import Method
from offsite.core.checkpoint import DECLARED_INDEX, DECLARED_WEIGHTS, INDEX, WEIGHTS
from offsite.exchange.manifest import FileEntry

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
RETURNED_WEIGHTS = "adapter.safetensors"  # the model's own tensors; a name that transformers and PEFT do not load
BOTTLENECK_WEIGHTS = "bottleneck.safetensors"  # of bottlenecks, in a return and in a plug-in
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
WEIGHTS_OF: Mapping[Method, str] = {  # the file of a return's tensors, by method
    "lora": ADAPTER_WEIGHTS,
    "full": RETURNED_WEIGHTS,
    "bitfit": RETURNED_WEIGHTS,
    "bottleneck": BOTTLENECK_WEIGHTS,
}

_SHARD = re.compile(r"(offsite-)?model-\d{5}-of-\d{5}\.safetensors")
_TOKENS = frozenset(
    {
        "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
        "additional_special_tokens", "extra_special_tokens",
    }
)  # fmt: skip
ALLOWED_KEYS: Mapping[str, frozenset[str]] = {
    GENERATION_CONFIG: frozenset(
        {
            "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p",
            "typical_p", "repetition_penalty", "max_length", "max_new_tokens", "num_beams",
        }
    ),
    SPECIAL_TOKENS: _TOKENS,
    TOKENIZER_CONFIG: _TOKENS
    | {
        "tokenizer_class", "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space",
        "clean_up_tokenization_spaces", "spaces_between_special_tokens", "split_special_tokens", "chat_template",
        "model_max_length", "model_input_names", "padding_side", "truncation_side", "legacy", "errors",
    },
}  # fmt: skip


def is_weights(name: str) -> bool:
    """Whether a file of a bundle holds weights or their index."""
    return name in (WEIGHTS, INDEX, DECLARED_WEIGHTS, DECLARED_INDEX) or _SHARD.fullmatch(name) is not None


def allowed_in_bundle(name: str) -> bool:
    """Whether a bundle may hold a file of this name."""
    return is_weights(name) or name in (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)


def cleaned(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON file of a bundle without the keys that may not travel."""
    return {key: value for key, value in content.items() if key in ALLOWED_KEYS[name]}


def content_problems(name: str, content: object) -> list[str]:
    """What in a JSON file of a bundle may not stand there."""
    if not isinstance(content, dict):
        return [f"{name} is not a JSON object"]
    problems = [f"{name}: key {key!r} is not permitted" for key in sorted(set(content) - ALLOWED_KEYS[name])]
    kind = content.get("tokenizer_class", "")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_]{0,64}", kind):
        problems.append(f"{name}: tokenizer_class {str(kind)[:60]!r} is no class name")
    return problems


def tokenizer_digest(files: Iterable[FileEntry]) -> str:
    """One SHA-256 for the tokenizer: over the names and digests of its files, in order of name."""
    digest = hashlib.sha256()
    for entry in sorted(files, key=lambda entry: entry.name):
        if entry.name in TOKENIZER_FILES:
            digest.update(f"{entry.name} {entry.sha256}\n".encode())
    return digest.hexdigest()
