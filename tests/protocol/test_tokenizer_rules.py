"""Files of tokenizers: those of all kinds pass, and every part has a limit."""

import json
from typing import Any

import pytest

from offsite.protocol.tokenizer_rules import tokenizer_problems, vocabulary_problems
from tokenizer_kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_passes(kind: str) -> None:
    assert list(tokenizer_problems(json.loads(KINDS[kind]().to_str()))) == []


def sound() -> dict[str, Any]:
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None, "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": 0, "content": "<s>"}],
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1}, "merges": []},
    }  # fmt: skip


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"script": "x"}, "key 'script' is not permitted"),
        ({"normalizer": {"type": "Python"}}, "the type 'Python', which is not permitted"),
        ({"normalizer": {"type": ["NFC"]}}, "is not permitted"),
        ({"normalizer": nested(9)}, "no object, or there are too many"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}}, "there are too many"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * 2**21}}, "is too long"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a" * 99}, "content": "b"}}, "has 99 characters"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, "has 99 characters"),
        ({"decoder": {"type": "Strip", "start": 2**40}}, "expected at most"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a*)*"}}}, "can match in several ways"),
        ({"padding": {"strategy": {"Fixed": 2**30}}}, "expected at most"),
        ({"model": {"type": "BPE", "vocab": {"a": True}, "merges": []}}, "token 'a' has 'True'"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}, "token 'a' has '2147483648'"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [["a"]]}}, "no list of pairs of tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [], "dropout": 0.5}}, "tokens are random"),
        ({"model": {"type": "Unigram", "vocab": [["a", None]]}}, "no list of pairs of token and score"),
        ({"model": {"type": "Remote", "vocab": {}}}, "the type 'Remote', which is not permitted"),
        ({"model": 3}, "model is not a JSON object"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "which is no token"),
        ({"added_tokens": [{"id": 1, "content": ""}]}, "which is no token"),
        ({"added_tokens": {"a": 1}}, "added_tokens is no list"),
    ],
)
def test_every_part_has_its_limit(change: dict[str, Any], says: str) -> None:
    assert list(tokenizer_problems(sound())) == []
    problems = list(tokenizer_problems(sound() | change))
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize("content", [None, [], "x", 3])
def test_what_is_no_object(content: object) -> None:
    assert list(tokenizer_problems(content)) == ["it is not a JSON object"]
    assert list(vocabulary_problems(content)) == ["it is not a JSON object"]
