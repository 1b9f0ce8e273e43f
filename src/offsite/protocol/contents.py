"""Lists the files that a bundle may contain, and the keys that its JSON files may have, for packing and verification.

All other keys are refused, because transformers acts upon many keys: `auto_map` imports code, a hub name as attention
implementation downloads kernels, a tokenizer may name other files.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from offsite.config import Method
from offsite.protocol.manifest import FileEntry
from offsite.protocol.tokenizer_rules import token_setting_problems
from offsite.storage.checkpoint_folder import DECLARED_INDEX, DECLARED_WEIGHTS, INDEX, WEIGHTS

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENIZER, VOCABULARY, CHAT_TEMPLATE = "tokenizer.json", "vocab.json", "chat_template.jinja"
ADDED_TOKENS = "added_tokens.json"  # a file of slow tokenizers: token -> token id
TOKENIZER_FILES = (
    ADDED_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "tokenizer.model",
    VOCABULARY,
    "merges.txt",
    CHAT_TEMPLATE,
)
PROCESSOR = "preprocessor_config.json"  # settings of the image processor of a vision encoder
RETURNED_WEIGHTS = "adapter.safetensors"  # tuned tensors of the model; a name that transformers and PEFT do not load
BOTTLENECK_WEIGHTS = "bottleneck.safetensors"  # tensors of bottlenecks, in a return and in a plug-in
CLASSIFIER = "classifier.safetensors"  # the classifier head of the data owner; a name that no library loads
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # PEFT's name
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
WEIGHTS_OF: Mapping[Method, str] = {  # the file of a return's tensors, by method
    "lora": ADAPTER_WEIGHTS,
    "full": RETURNED_WEIGHTS,
    "bitfit": RETURNED_WEIGHTS,
    "bottleneck": BOTTLENECK_WEIGHTS,
}


BESIDE_A_MODEL = ("LICENSE", "LICENSE.txt")  # files of a base that a merged plug-in copies
# Of multi-modal models, whose plug-in is the whole checkpoint.
OF_PROCESSORS = ("processor_config.json", "video_preprocessor_config.json", "chat_template.json")


def checkpoint_file(number: int) -> str:
    """The file name of checkpoint `number` (from 1) of a return, except of the last one, which `WEIGHTS_OF` names."""
    return f"checkpoint-{number}.safetensors"


_MOST_TOKENS = 2**31
_SHARD = re.compile(r"(offsite-)?model-\d{5}-of-\d{5}\.safetensors")
_TOKENS = frozenset(
    {
        "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
        "additional_special_tokens", "extra_special_tokens",
    }
)  # fmt: skip
ALLOWED_KEYS: Mapping[str, frozenset[str] | None] = {  # by file name; None: any key, because the keys are tokens
    ADDED_TOKENS: None,
    PROCESSOR: frozenset(
        {
            "image_processor_type", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
            "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb",
        }
    ),
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
    """Whether a file of a bundle contains weights or their index."""
    return name in (WEIGHTS, INDEX, DECLARED_WEIGHTS, DECLARED_INDEX) or _SHARD.fullmatch(name) is not None


def allowed_in_bundle(name: str) -> bool:
    """Whether a bundle may contain a file of this name."""
    return is_weights(name) or name in (CONFIG, GENERATION_CONFIG, PROCESSOR, *TOKENIZER_FILES)


def allowed_in_plug_in(name: str) -> bool:
    """Whether a plug-in may contain a file of this name: a file of an adapter or of a complete checkpoint."""
    return allowed_in_bundle(name) or name in (
        ADAPTER_CONFIG,
        *WEIGHTS_OF.values(),
        *OF_PROCESSORS,
        *BESIDE_A_MODEL,
    )


def cleaned(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the content of the JSON file `name` with only the permitted keys.

    The old name of an image processor class, in `feature_extractor_type`, is replaced by the present name.
    """
    older = content.get("feature_extractor_type") if name == PROCESSOR else None
    if isinstance(older, str):
        content = {"image_processor_type": older.replace("FeatureExtractor", "ImageProcessor"), **content}
    allowed = ALLOWED_KEYS[name]
    return {key: value for key, value in content.items() if allowed is None or key in allowed}


def content_problems(name: str, content: object) -> list[str]:
    """A message for each reason why a bundle may not contain the JSON file `name` with this parsed content."""
    if not isinstance(content, dict):
        return [f"{name} is not a JSON object"]
    allowed = ALLOWED_KEYS[name]
    if allowed is None:
        return [
            f"{name}: token {token[:60]!r} has {str(number)[:60]!r}, which is not a token id"
            for token, number in content.items()
            if type(number) is not int or not 0 <= number < _MOST_TOKENS
        ]
    problems = [f"{name}: key {key!r} is not permitted" for key in sorted(set(content) - allowed)]
    if name == PROCESSOR:
        kind = content.get("image_processor_type", "")
        if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_]{0,64}", kind):
            problems.append(f"{name}: image_processor_type {str(kind)[:60]!r} is no class name")
        problems += processor_problems(content)
    if name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        problems += [f"{name}: {problem}" for problem in token_setting_problems(content)]
    if name == GENERATION_CONFIG:
        problems += [f"{name}: {problem}" for problem in generation_problems(content)]
    return problems


def processor_problems(content: Mapping[str, Any]) -> list[str]:
    """A message for each setting of an image processor whose value has an unsupported form."""
    numbers = (int, float)
    bad = [key for key in _SWITCHES if type(content.get(key, False)) not in (bool, type(None))]
    bad += [key for key in ("image_mean", "image_std") if not _numbers(content.get(key, [1.0]))]
    if isinstance(content.get("image_std"), list) and 0 in content["image_std"]:
        bad.append("image_std")
    bad += [key for key in ("size", "crop_size") if not _sides(content.get(key))]
    if content.get("resample", 3) not in (0, 1, 2, 3, 4, 5) or type(content.get("resample", 3)) is not int:
        bad.append("resample")
    if type(content.get("rescale_factor", 1.0)) not in numbers:
        bad.append("rescale_factor")
    return [f"{PROCESSOR}: {key} = {str(content.get(key))[:60]!r} is no plain setting" for key in bad]


def generation_problems(content: Mapping[str, Any]) -> list[str]:
    """A message for each setting of generation whose value is no number or switch of a usual size."""
    return [
        f"{key} = {str(value)[:60]!r} is no such setting"
        for key, value in content.items()
        if value is not None and key in _GENERATION and not _GENERATION[key](value)
    ]


def _is_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    return 1 <= len(ids) <= 64 and all(type(one) is int and -1 <= one < _MOST_TOKENS for one in ids)


def _is_amount(value: object) -> bool:
    return type(value) is int and 0 <= value <= 2**31


def _is_degree(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, int | float) and 0 <= value <= 1e6


_GENERATION: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _is_token_ids),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"), _is_degree),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens", "num_beams"), _is_amount),
    "do_sample": lambda value: isinstance(value, bool),
}
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_LARGEST_SIDE = 4096  # pixels


def _numbers(value: object) -> bool:
    """Whether a value is a list of one to four numbers."""
    return isinstance(value, list) and 1 <= len(value) <= 4 and all(type(one) in (int, float) for one in value)


def _sides(value: object) -> bool:
    """Whether a `size` setting is one side, height and width, or the shortest edge, each from 1 to 4096 pixels."""
    named = value if isinstance(value, dict) else {"height": 1 if value is None else value}
    return set(named) in ({"height"}, {"height", "width"}, {"shortest_edge"}) and all(
        type(side) is int and 1 <= side <= _LARGEST_SIDE for side in named.values()
    )


def tokenizer_digest(files: Iterable[FileEntry]) -> str:
    """The SHA-256, in hex, over the names and digests of the files of the tokenizer or image processor.

    Args:
        files: the files that a manifest lists; files of other kinds are ignored.
    """
    digest = hashlib.sha256()
    for entry in sorted(files, key=lambda entry: entry.name):
        if entry.name in (PROCESSOR, *TOKENIZER_FILES):
            digest.update(f"{entry.name} {entry.sha256}\n".encode())
    return digest.hexdigest()
