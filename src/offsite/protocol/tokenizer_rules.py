"""What the files of a tokenizer in a bundle may hold: parts from a closed list, and limits on sizes. Torch-free.

The limits admit the tokenizers of all supported families. What passes is still run in a process of its own.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from offsite.protocol.regex_rules import regex_problem

_CLASSES = frozenset(
    """
    Albert BarthezBart Bart Barthez Bert BigBird BioGpt Blenderbot BlenderbotSmall Bloom ByT5 CTRL Camembert CodeGen
    CodeLlama Cohere Cohere2 DebertaV2 Electra Ernie GPT2 GPTNeoX GPTNeoXJapanese GPTSw3 Gemma Herbert Llama
    MBart MBart50 MPNet Marian Mvp Nllb OpenAIGPT PLBart Pegasus ProphetNet Qwen2 Qwen3_5 Reformer RemBert RoFormer
    Roberta T5 Whisper XGLM XLMRoberta XLNet
    """.split()  # noqa: SIM905  a table of words
)
TOKENIZER_CLASSES = frozenset(
    {f"{name}Tokenizer{end}" for name in _CLASSES for end in ("", "Fast")}
    | {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "SentencePieceBackend"}
)
_PARTS: Mapping[str, frozenset[str]] = {  # the types that each part of tokenizer.json may have
    "normalizer": frozenset(
        [
            "BertNormalizer",
            "ByteLevel",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Precompiled",
            "Prepend",
            "Replace",
            "Sequence",
            "Strip",
            "StripAccents",
        ]
    ),
    "pre_tokenizer": frozenset(
        [
            "BertPreTokenizer",
            "ByteLevel",
            "CharDelimiterSplit",
            "Digits",
            "Metaspace",
            "Punctuation",
            "Sequence",
            "Split",
            "UnicodeScripts",
            "Whitespace",
            "WhitespaceSplit",
        ]
    ),
    "post_processor": frozenset(["BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"]),
    "decoder": frozenset(
        [
            "BPEDecoder",
            "ByteFallback",
            "ByteLevel",
            "CTC",
            "Fuse",
            "Metaspace",
            "Replace",
            "Sequence",
            "Strip",
            "WordPiece",
        ]
    ),
    "model": frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"}),
}
_TOP = frozenset({"version", "truncation", "padding", "added_tokens", *_PARTS})
_NESTED = ("normalizers", "pretokenizers", "processors", "decoders")  # keys of a Sequence
_MOST_PARTS, _DEEPEST = 64, 4
_MOST_TOKENS, _MOST_ADDED = 2**21, 2**17
_LONGEST_TOKEN, _LONGEST_TEXT, _LONGEST_MAP = (
    1024,
    32,
    2**20,
)  # characters: a token, a setting, a table of normalisation
_LARGEST = 2**20  # of a number among the settings
_LONGEST_TEMPLATE = 2**20  # characters of a chat template


def tokenizer_problems(content: object) -> Iterator[str]:
    """Yield a message for each reason why a bundle may not contain a tokenizer.json with this parsed content."""
    if not isinstance(content, dict):
        yield "it is not a JSON object"
        return
    yield from (f"key {key[:60]!r} is not permitted" for key in sorted(content.keys() - _TOP))
    left = [_MOST_PARTS]
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if content.get(key) is not None and left[0] >= 0:
            yield from _part_problems(key, key, content[key], left, 0)
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            yield from _setting_problems(key, content[key], _DEEPEST - 2)
    yield from _model_problems(content.get("model"))
    yield from _added_problems(content.get("added_tokens", []))


def _part_problems(kind: str, where: str, part: object, left: list[int], depth: int) -> Iterator[str]:
    """Yield messages about one part of the tokenizer, and about the parts in it.

    `left` holds the number of parts that may still come, and is changed.
    """
    left[0] -= 1
    if not isinstance(part, dict) or left[0] < 0 or depth > _DEEPEST:
        yield f"{where} is no object, or there are too many of them"
        return
    if str(part.get("type")) not in _PARTS[kind]:
        yield f"{where} has the type {str(part.get('type'))[:60]!r}, which is not permitted"
    for key, value in part.items():
        if key in _NESTED and isinstance(value, list):
            for one in value:
                yield from _part_problems(kind, f"{where}.{key}", one, left, depth + 1)
                if left[0] < 0:
                    return
        elif key == "precompiled_charsmap":
            if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST_MAP):
                yield f"{where}.{key} is too long"
        elif isinstance(value, dict) and value.keys() == {"Regex"}:
            problem = regex_problem(value["Regex"])
            if problem:
                yield f"{where}.{key}: {problem}"
        else:
            yield from _setting_problems(f"{where}.{key}", value, _DEEPEST)


def _setting_problems(where: str, value: object, depth: int) -> Iterator[str]:
    """Yield a message for each value in the settings of a part that is too large, too long or nested too deeply."""
    if isinstance(value, str):
        longest = _LONGEST_TOKEN if where.startswith(("post_processor", "padding", "model")) else _LONGEST_TEXT
        if len(value) > longest:
            yield f"{where} has {len(value)} characters, at most {longest}"
    elif isinstance(value, dict | list):
        inner = [*value.items()] if isinstance(value, dict) else [("", one) for one in value]
        if not depth or len(inner) > _LONGEST_TOKEN:
            yield f"{where} is nested too deeply, or too long"
            return
        for key, one in inner:
            if len(key) > _LONGEST_TOKEN:
                yield f"{where} has a key that is too long"
                return
            yield from _setting_problems(f"{where}.{key}" if key else where, one, depth - 1)
    elif isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
        yield f"{where} = {str(value)[:60]}, expected at most {_LARGEST}"


def _model_problems(model: object) -> Iterator[str]:
    """Yield messages about the model of the tokenizer: its type, its vocabulary and merges, and its settings."""
    if not isinstance(model, dict):
        yield "model is not a JSON object"
        return
    kind = model.get("type", "BPE")  # older files do not name it
    if str(kind) not in _PARTS["model"]:
        yield f"model has the type {str(kind)[:60]!r}, which is not permitted"
    vocabulary, merges = model.get("vocab"), model.get("merges", [])
    if isinstance(vocabulary, dict):
        yield from _id_problems("model.vocab", vocabulary)
    elif isinstance(vocabulary, list):
        if len(vocabulary) > _MOST_TOKENS or not all(map(_is_scored, vocabulary)):
            yield "model.vocab is no list of pairs of token and score"
    else:
        yield "model.vocab is neither an object nor a list"
    if not isinstance(merges, list) or len(merges) > _MOST_TOKENS or not all(map(_is_merge, merges)):
        yield "model.merges is no list of pairs of tokens"
    if model.get("dropout"):
        yield f"model.dropout = {str(model['dropout'])[:60]}, with which tokens are random"
    for key, value in model.items():
        if key not in ("vocab", "merges", "type"):
            yield from _setting_problems(f"model.{key}", value, 0)


def _is_scored(pair: object) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and len(pair[0]) <= _LONGEST_TOKEN
        and type(pair[1]) in (int, float)
        and math.isfinite(pair[1])
    )


def _is_merge(pair: object) -> bool:
    if isinstance(pair, str):
        return len(pair) <= 2 * _LONGEST_TOKEN
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)


def _id_problems(where: str, tokens: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message if a vocabulary is too large, has a token that is too long, or an id that is none."""
    if len(tokens) > _MOST_TOKENS:
        yield f"{where} has {len(tokens)} tokens, at most {_MOST_TOKENS}"
        return
    wrong = next((one for one in tokens.items() if not _is_id(one[1]) or len(one[0]) > _LONGEST_TOKEN), None)
    if wrong:
        yield f"{where}: token {wrong[0][:60]!r} has {str(wrong[1])[:60]!r}, expected an id below {_MOST_TOKENS}"


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_TOKENS


def _added_problems(added: object) -> Iterator[str]:
    """Yield messages about the list of added tokens."""
    if not isinstance(added, list) or len(added) > _MOST_ADDED:
        yield "added_tokens is no list, or too long"
        return
    for entry in added:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not _is_token(entry):
            yield f"added_tokens has {str(entry)[:80]!r}, which is no token"
            return


def _is_token(value: object) -> bool:
    """Whether a value is a token of a settings file: a text, or an object with its content and switches."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_TOKEN
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        return False
    others = [one for key, one in value.items() if key not in ("content", "id", "__type")]
    return len(value["content"]) <= _LONGEST_TOKEN and all(isinstance(one, bool) for one in others)


def _is_token_list(value: object) -> bool:
    tokens = [*value.values()] if isinstance(value, dict) else value
    return isinstance(tokens, list) and len(tokens) <= _MOST_ADDED and all(map(_is_token, tokens))


def _is_decoder(value: object) -> bool:
    """Whether a value is an object of added tokens, by their ids as text."""
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_ADDED
        and all(re.fullmatch(r"[0-9]{1,7}", key) and _is_token(one) for key, one in value.items())
    )


def _is_template(value: object) -> bool:
    """Whether a value is a chat template, or a list of named ones."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEMPLATE
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(
            isinstance(one, dict)
            and one.keys() == {"name", "template"}
            and isinstance(one["name"], str)
            and isinstance(one["template"], str)
            and len(one["template"]) <= _LONGEST_TEMPLATE
            for one in value
        )
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, int | float) and value >= 1


_SETTINGS: tuple[tuple[str, Callable[[object], bool]], ...] = (
    ("bos_token eos_token unk_token pad_token sep_token cls_token mask_token", _is_token),
    ("additional_special_tokens extra_special_tokens", _is_token_list),
    (
        (
            "add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces spaces_between_special_tokens "
            "split_special_tokens legacy"
        ),
        lambda value: isinstance(value, bool),
    ),
    ("added_tokens_decoder", _is_decoder),
    ("chat_template", _is_template),
    ("model_max_length", _is_number),
    ("padding_side truncation_side", lambda value: value in ("left", "right")),
    ("errors", lambda value: value in ("strict", "ignore", "replace")),
    (
        "model_input_names",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(one, str) and re.fullmatch(r"[a-z_]{1,40}", one) for one in value)
        ),
    ),
    ("tokenizer_class", lambda value: isinstance(value, str) and (not value or value in TOKENIZER_CLASSES)),
)
_CHECKS = {key: check for keys, check in _SETTINGS for key in keys.split()}


def vocabulary_problems(content: object) -> Iterator[str]:
    """Yield a message for each reason why a bundle may not contain a vocab.json with this parsed content."""
    if isinstance(content, dict):
        yield from _id_problems("the vocabulary", content)
    else:
        yield "it is not a JSON object"


def token_setting_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each value in tokenizer_config.json or special_tokens_map.json of an unsupported form."""
    for key, value in content.items():
        if value is not None and key in _CHECKS and not _CHECKS[key](value):
            yield f"{key} = {str(value)[:60]!r} is no such setting of a supported tokenizer"
