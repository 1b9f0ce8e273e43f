import hashlib

import pytest

from offsite.protocol.contents import (
    ADDED_TOKENS,
    ALLOWED_KEYS,
    GENERATION_CONFIG,
    PROCESSOR,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    allowed_in_bundle,
    cleaned,
    content_problems,
    is_weights,
    tokenizer_digest,
)
from offsite.protocol.manifest import FileEntry

GOOD = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
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
    "processor_config.json",
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


@pytest.mark.parametrize("name", [GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG])
def test_cleaned_is_without_problems(name: str) -> None:
    content = dict.fromkeys(ALLOWED_KEYS[name] or ()) | {"auto_map": {}, "name_or_path": "/home/x", "_private": 1}
    kept = cleaned(name, content)
    assert set(kept) == ALLOWED_KEYS[name]
    assert content_problems(name, kept) == []
    assert len(content_problems(name, content)) == 3


PLAIN = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 224, "width": 224},
    "resample": 3, "do_center_crop": None, "crop_size": 224, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [1, 0.5, 0.25], "do_convert_rgb": None,
}  # fmt: skip


def test_settings_of_an_image_processor() -> None:
    assert set(PLAIN) == ALLOWED_KEYS[PROCESSOR]
    assert content_problems(PROCESSOR, PLAIN) == []
    assert content_problems(PROCESSOR, {}) == []
    assert cleaned(PROCESSOR, {**PLAIN, "auto_map": {}}) == PLAIN


def test_the_older_key_with_the_class_of_an_image_processor_becomes_todays() -> None:
    older = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
    assert cleaned(PROCESSOR, older) == {"image_processor_type": "CLIPImageProcessor", "size": 224}
    assert cleaned(PROCESSOR, {**PLAIN, **older}) == {**PLAIN, "size": 224}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_processor_type", "evil/module"),
        ("do_resize", "x"),
        ("do_rescale", 1),
        ("size", {"longest_edge": 224}),
        ("size", {"height": 100_000, "width": 100_000}),
        ("size", {"height": 0, "width": 1}),
        ("size", "224"),
        ("crop_size", {"height": True, "width": 224}),
        ("resample", 6),
        ("resample", "bicubic"),
        ("rescale_factor", "1/255"),
        ("image_mean", 0.5),
        ("image_mean", []),
        ("image_mean", ["a"]),
        ("image_std", [0.5, 0, 0.5]),
        ("auto_map", {"AutoImageProcessor": "evil.Processor"}),
    ],
)
def test_settings_that_an_image_processor_may_not_have(key: str, value: object) -> None:
    assert len(content_problems(PROCESSOR, PLAIN | {key: value})) == 1


def test_added_tokens_are_tokens_with_their_numbers() -> None:
    tokens = {"<|user|>": 50257, "auto_map": 50258}
    assert cleaned(ADDED_TOKENS, tokens) == tokens
    assert content_problems(ADDED_TOKENS, tokens) == []
    for number in ("1", -1, 2**31, True, 1.0, None, {"id": 1}):
        assert len(content_problems(ADDED_TOKENS, {**tokens, "x": number})) == 1


@pytest.mark.parametrize("value", ["a.b", "a/b", "a--b", 3, ["x"], "x" * 65, "RagTokenizer", "BertJapaneseTokenizer"])
def test_a_tokenizer_class_that_is_refused(value: object) -> None:
    assert content_problems(TOKENIZER_CONFIG, {"tokenizer_class": value})


@pytest.mark.parametrize("value", ["", None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast"])
def test_a_tokenizer_class_that_is_permitted(value: object) -> None:
    assert content_problems(TOKENIZER_CONFIG, {"tokenizer_class": value}) == []


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (TOKENIZER_CONFIG, "add_bos_token", 1),
        (TOKENIZER_CONFIG, "bos_token", {"content": ""}),
        (TOKENIZER_CONFIG, "eos_token", ["</s>"]),
        (TOKENIZER_CONFIG, "chat_template", [{"name": "default"}]),
        (TOKENIZER_CONFIG, "added_tokens_decoder", {"x": {"content": "a"}}),
        (TOKENIZER_CONFIG, "model_max_length", -1),
        (TOKENIZER_CONFIG, "padding_side", "middle"),
        (SPECIAL_TOKENS, "additional_special_tokens", [3]),
        (GENERATION_CONFIG, "temperature", "hot"),
        (GENERATION_CONFIG, "eos_token_id", [True]),
        (GENERATION_CONFIG, "do_sample", 1),
    ],
)
def test_settings_of_another_kind(name: str, key: str, value: object) -> None:
    assert len(content_problems(name, {key: value})) == 1


@pytest.mark.parametrize("content", [None, 3, "x", [], [{}]])
def test_what_is_no_object(content: object) -> None:
    for name in (ADDED_TOKENS, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG):
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
