import hashlib

import pytest

from offsite.exchange.contents import (
    ALLOWED_KEYS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    allowed_in_bundle,
    cleaned,
    content_problems,
    is_weights,
    tokenizer_digest,
)
from offsite.exchange.manifest import FileEntry

GOOD = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
]
BAD = [
    "pytorch_model.bin",
    "model.safetensors.bak",
    "adapter_config.json",
    "adapter_model.safetensors",
    "evil.py",
    "model-1-of-2.safetensors",
    "xmodel-00001-of-00002.safetensors",
    "README.md",
    "tf_model.h5",
    "model.gguf",
    "preprocessor_config.json",
    "custom_generate.py",
    "Config.json",
    "consolidated.pth",
]


@pytest.mark.parametrize("name", GOOD)
def test_files_that_a_bundle_may_hold(name: str) -> None:
    assert allowed_in_bundle(name)


@pytest.mark.parametrize("name", [*BAD, "", "model.safetensors\n"])
def test_files_that_it_may_not(name: str) -> None:
    assert not allowed_in_bundle(name)
    assert not is_weights(name)


@pytest.mark.parametrize("name", sorted(ALLOWED_KEYS))
def test_cleaned_is_without_problems(name: str) -> None:
    content = dict.fromkeys(ALLOWED_KEYS[name], "x") | {"auto_map": {}, "name_or_path": "/home/x", "_private": 1}
    kept = cleaned(name, content)
    assert set(kept) == ALLOWED_KEYS[name]
    assert content_problems(name, kept) == []
    assert len(content_problems(name, content)) == 3


@pytest.mark.parametrize("value", ["a.b", "a/b", "a--b", "", None, 3, ["x"], "x" * 65])
def test_tokenizer_class(value: object) -> None:
    assert bool(content_problems(TOKENIZER_CONFIG, {"tokenizer_class": value})) is (value != "")


@pytest.mark.parametrize("content", [None, 3, "x", [], [{}]])
def test_what_is_no_object(content: object) -> None:
    for name in (GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG):
        assert content_problems(name, content) == [f"{name} is not a JSON object"]


def entry(name: str, content: bytes) -> FileEntry:
    return FileEntry(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_tokenizer_digest() -> None:
    one = [entry("tokenizer.json", b"a"), entry("vocab.json", b"b"), entry("model.safetensors", b"c")]
    assert tokenizer_digest(one) == tokenizer_digest(reversed(one))
    assert tokenizer_digest(one) == tokenizer_digest([*one, entry("config.json", b"d")])
    others = [
        [entry("tokenizer.json", b"x"), *one[1:]],
        one[1:],
        [entry("vocab.json", b"a"), entry("tokenizer.json", b"b")],
        [*one, entry("merges.txt", b"")],
    ]
    assert len({tokenizer_digest(files) for files in (one, *others)}) == 5
