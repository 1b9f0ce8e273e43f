"""Checks the files of a tokenizer against the model's config, without loading it: end token, and token ids.

Torch-free, so that a plan can run them. The loaded tokenizer is tried in `offsite.evaluation.first_row`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from offsite.models.model_folder import Source, has_file, read_bytes

_LISTED = 6  # tokens that an error lists
_NAMED = ("bos_token", "eos_token", "unk_token")  # what rows are encoded with
# Classes without special tokens of their own: what the files do not name does not exist.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")


@dataclass
class TokenFiles:
    """What a tokenizer's files contain: all tokens with their ids, and the names of special tokens."""

    numbers: dict[str, int] = field(default_factory=dict)  # id of every token
    special: set[str] = field(default_factory=set)  # tokens that no text contains, unless it is written out
    named: dict[str, str] = field(default_factory=dict)  # such as eos_token -> </s>
    plain_class: bool = False  # whether the class of the tokenizer has no special tokens of its own
    problems: list[str] = field(default_factory=list)  # a message for each malformed file


def tokenizer_problems(source: Source, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The problems of a tokenizer's files, by kind; kinds without problems are left out.

    The kinds are "files" (malformed ones), "end token" (none is named), "numbers" (token ids without an embedding) and
    "model" (begin and end tokens that config.json numbers differently).

    Args:
        source: the model's folder, or a snapshot of its files.
        config: the model's config; token ids must be below its `vocab_size`.
    """
    read = read_token_files(source)
    found = {"files": read.problems, "end token": [], "numbers": list(_beyond(read, config)), "model": []}
    if read.plain_class and "eos_token" not in read.named:
        found["end token"] = ["no file names an eos_token"]
    ends = {name: read.numbers.get(read.named.get(name, "")) for name in ("bos_token", "eos_token")}
    others = [name for name, number in ends.items() if _differs(config.get(f"{name}_id"), number)]
    if len(others) == len(ends):  # one of them may be another: models are tuned for chat with an end token of their own
        found["model"] = [f"{name} is number {ends[name]}, in config.json {config[f'{name}_id']}" for name in others]
    return {kind: problems for kind, problems in found.items() if problems}


def read_token_files(source: Source) -> TokenFiles:
    """Read the tokens from tokenizer.json or vocab.json, and the names of special tokens from the other files."""
    read = TokenFiles()
    settings = _json(source, "tokenizer_config.json", read)
    for content in (_json(source, "special_tokens_map.json", read), settings):
        for name in _NAMED:
            token = content.get(name)
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                read.named[name] = token
    read.plain_class = settings.get("tokenizer_class") in _PLAIN_CLASSES
    whole = _json(source, "tokenizer.json", read)
    model = whole.get("model")
    _add_vocabulary(read, model.get("vocab") if isinstance(model, Mapping) else _json(source, "vocab.json", read))
    added, decoder = whole.get("added_tokens"), settings.get("added_tokens_decoder")
    if isinstance(added, list):
        for entry in added:
            if isinstance(entry, Mapping):
                _add_token(read, entry.get("id"), entry)
    elif isinstance(decoder, Mapping):
        for number, entry in decoder.items():
            _add_token(read, number, entry)
    return read


def _add_vocabulary(read: TokenFiles, vocabulary: object) -> None:
    """Add the tokens of a vocabulary, {token: id} or a list of (token, score), to `read`."""
    if isinstance(vocabulary, Mapping):
        read.numbers |= {str(token): number for token, number in vocabulary.items() if type(number) is int}
    elif isinstance(vocabulary, list):  # of a Unigram model: pairs of token and score, in order
        pairs = enumerate(vocabulary)
        read.numbers |= {str(pair[0]): number for number, pair in pairs if isinstance(pair, list) and pair}


def _add_token(read: TokenFiles, number: object, entry: object) -> None:
    """Add one entry of the list of added tokens to `read`, if it is well formed."""
    if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and str(number).isdecimal():
        read.numbers[entry["content"]] = int(str(number))
        if entry.get("special"):
            read.special.add(entry["content"])


def _json(source: Source, name: str, read: TokenFiles) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file or it is malformed, which is noted in `read`."""
    if not has_file(source, name):
        return {}
    try:
        content = json.loads(read_bytes(source, name).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        read.problems.append(f"{name}: {str(error)[:200]}")
        return {}
    if not isinstance(content, dict):
        read.problems.append(f"{name} is not a JSON object")
        return {}
    return content


def _beyond(read: TokenFiles, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each token whose id is not below `vocab_size`, so that the model has no embedding for it.

    Special tokens that nothing uses are permitted, such as that of pictures in Gemma 3's tokenizer for text.
    """
    known = config.get("vocab_size")
    if not isinstance(known, int):
        return
    used = set(read.named.values())
    beyond = {
        token: number
        for token, number in read.numbers.items()
        if number >= known and (token in used or token not in read.special)
    }
    for token, number in sorted(beyond.items(), key=lambda pair: pair[1])[:_LISTED]:
        yield f"token {token[:60]!r} is number {number}, the model knows 0 to {known - 1}"
    if len(beyond) > _LISTED:
        yield f"and {len(beyond) - _LISTED} more"


def _differs(expected: object, number: int | None) -> bool:
    """Whether config.json (`expected`) and the tokenizer (`number`) both have an id for a token, and the two differ."""
    return number is not None and type(expected) is int and expected != number
