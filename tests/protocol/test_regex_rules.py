"""Regular expressions of tokenizers: those of published ones pass, those that may take for ever do not."""

import pytest

from offsite.protocol.regex_rules import regex_problem

PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3, Qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "DeepSeek-V3": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "Falcon": r"[0-9][0-9][0-9]",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "Chinese and Japanese": r"[一-龥぀-ゟ゠-ヿ]+",
    "DeepSeek-LLM": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
    "Phi 3": r" {2,}",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_those_of_published_tokenizers(name: str) -> None:
    assert regex_problem(PUBLISHED[name]) is None


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a+)+$", "can match in several ways"),
        (r"(a|a)*", "can match in several ways"),
        (r"(a?){50}", "can match in several ways"),
        (r"((a|b)?)+", "can match in several ways"),
        (r"(?:(?:a{1,5})b)+", "can match in several ways"),
        (r"(.)\1+", "refers to a group"),
        (r"(?R)", "a kind of group"),
        (r"(?<x>a)\g<x>", "a kind of group"),
        (r"(*FAIL)", "a kind of group"),
        (r"a*a*a*a*b", "repetitions follow each other"),
        (r"(?:a*a*)(?:a*a*)b", "repetitions follow each other"),
        (r"x{100000}", "over 1000 times"),
        ("(" * 40 + ")" * 40, "nested too deeply"),
        ("[a", "has no end"),
        ("(a", "has no end"),
        ("a)", "never began"),
        ("x" * 5000, "at most 4096 characters"),
        (3, "at most 4096 characters"),
        (None, "at most 4096 characters"),
    ],
)
def test_what_may_take_for_ever(pattern: object, says: str) -> None:
    assert says in (regex_problem(pattern) or "")
