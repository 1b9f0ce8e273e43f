"""The tokenizer of a stranger's bundle runs in a process of its own: with the same results, and within limits."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from offsite.data import confined_tokenizer as module
from offsite.data.confined_tokenizer import ConfinedTokenizer, confined_tokenizer
from offsite.data.conversations.parse_messages import Turn
from offsite.data.encoded_part import EncodedPart, choices_message, read_choices
from offsite.data.examples import Choices, Example
from offsite.data.row import Row
from offsite.data.tokens import encode, encode_choices, encode_prompt
from offsite.errors import DataError, IncompatibleError
from offsite.models.tokenizers import load_tokenizer
from tokenizer_kinds import saved_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = (Turn("user", "Who jumps over the dog?"), Turn("assistant", "The quick brown fox. ü"))
ROWS = [
    Row(1, "Question: who jumps?\nAnswer:", " lions"),
    Row(2, None, "two parties who do not trust each other"),
    Row(3, None, "", turns=ASKED),
    Row(4, "Who?", " foxes", choices=(" foxes", " dogs and bunnies"), answer=1),
    Row(5, None, "the lazy dog " * 40, document=True),
]


def folder_with(folder: Path, template: str | None = TEMPLATE) -> Path:
    folder.mkdir()
    saved_tokenizer(folder, "byte level", template=template, special=["<|im_start|>", "<|im_end|>"])
    return folder


def test_the_same_tokens_as_in_this_process(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model")
    here = load_tokenizer(folder)
    with confined_tokenizer(folder) as there:
        for long_rows in ("truncate", "skip"):
            options = {"source": tmp_path, "max_length": 24, "long_rows": long_rows}
            one, other = encode(ROWS, here, **options), encode(ROWS, there, **options)
            assert_same(one.examples, other.examples)
            assert dataclasses.replace(one, examples=()) == dataclasses.replace(other, examples=())
            first, second = encode_choices(ROWS, here, **options), encode_choices(ROWS, there, **options)
            assert [(c.line, c.lengths, c.answer) for c in first] == [(c.line, c.lengths, c.answer) for c in second]
            assert_same([e for c in first for e in c.examples], [e for c in second for e in c.examples])
        assert encode_prompt(ROWS[0], there) == encode_prompt(ROWS[0], here)
        assert there.decode([40, 41], skip_special_tokens=True) == here.decode([40, 41], skip_special_tokens=True)
        assert there.eos_token_id == here.eos_token_id
        with pytest.raises(DataError, match="over the longest length"):
            encode(ROWS, there, source=tmp_path, max_length=8)


def assert_same(one: tuple[Example, ...] | list[Example], other: tuple[Example, ...] | list[Example]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert (a.line, a.given, a.answers, a.file) == (b.line, b.given, b.answers, b.file)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.labelled, b.labelled)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "seconds", "says"),
    [
        ("{{ 'a' * 10**12 }}", 60.0, "GiB"),
        (LOOP, 3.0, "it took over"),
        pytest.param("{% set x = 9**9**9 %}", 3.0, "it took over", marks=pytest.mark.every_form),
    ],
)
def test_a_template_without_end(
    template: str, seconds: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with confined_tokenizer(folder_with(tmp_path / "model", template)) as tokenizer:
        monkeypatch.setattr(module, "_SECONDS", seconds)
        with pytest.raises(IncompatibleError) as caught:
            encode(ROWS[2:3], tokenizer, source=tmp_path, max_length=64)
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons


def test_a_template_that_calls_itself(tmp_path: Path) -> None:
    endless = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    with (
        confined_tokenizer(folder_with(tmp_path / "model", endless)) as tokenizer,
        pytest.raises(DataError, match="cannot be used with this model's chat template"),
    ):
        encode(ROWS[2:3], tokenizer, source=tmp_path, max_length=64)


def test_one_worker_serves_one_tokenizer_after_the_other(tmp_path: Path) -> None:
    first, second = folder_with(tmp_path / "first"), folder_with(tmp_path / "second", None)
    with confined_tokenizer(first) as tokenizer:
        process = tokenizer._worker._process.pid
    with confined_tokenizer(second) as tokenizer:
        assert tokenizer._worker._process.pid == process
        with pytest.raises(DataError, match="no chat template"):
            encode(ROWS[2:3], tokenizer, source=tmp_path, max_length=64)
        with confined_tokenizer(first) as other:  # two at once are two processes
            assert other._worker._process.pid != process


def test_a_tokenizer_that_does_not_load(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(IncompatibleError) as caught, confined_tokenizer(folder):
        pass
    assert str(folder) in caught.value.what or caught.value.reasons


@pytest.mark.parametrize(
    "answer", [{}, {"eos_token_id": None}, {"eos_token_id": 1.5}, {"eos_token_id": -1}, {"eos_token_id": 2**31}]
)
def test_an_end_token_that_is_none(answer: dict[str, object]) -> None:
    with pytest.raises(IncompatibleError, match="gives no token ids"):
        ConfinedTokenizer(Answers({}), Path("bundle"), answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [{}, {"ids": 3}, {"ids": [-1]}, {"ids": ["1"]}, {"ids": [2**31]}])
def test_a_prompt_or_an_answer_that_is_none(ids: dict[str, object]) -> None:
    tokenizer = ConfinedTokenizer(Answers(ids), Path("bundle"), {"eos_token_id": 2})  # type: ignore[arg-type]
    with pytest.raises(IncompatibleError, match="gives no token ids"):
        tokenizer.prompt_ids(ROWS[0])
    with pytest.raises(IncompatibleError, match="gives no token ids"):
        tokenizer.decode([1], skip_special_tokens=True)


@dataclasses.dataclass
class Answers:
    """What stands for the worker of a tokenizer that has taken it over."""

    said: dict[str, object]

    def ask(self, facts: Mapping[str, object], size: int) -> tuple[dict[str, object], bytes]:
        return self.said, b""


IDS = np.array([1, 2, 3], dtype=np.int64)
SOUND = EncodedPart(examples=[Example(1, IDS, 1), Example(2, IDS, 1, np.array([1, 2]))], lengths=[3, 3])


def test_a_message_is_read_as_it_was_written() -> None:
    read = EncodedPart.from_message(*SOUND.message())
    assert_same(read.examples, SOUND.examples)
    choice = Choices(3, (Example(3, IDS, 1), Example(3, IDS, 2)), (4, 5), 1)
    (found,), long = read_choices(*choices_message([choice], ["x"]))
    assert (found.line, found.lengths, found.answer, long) == (3, (4, 5), 1, ["x"])


@pytest.mark.parametrize(
    "change",
    [
        {"examples": [[1, 10**9, 1, None, True, None]]},
        {"examples": [[1, -1, 1, None, True, None]]},
        {"examples": [[1, 2, 1, 1, True, None]]},
        {"examples": [[1, 3, 1, None, True, 7]]},
        {"examples": [[1, 3]]},
        {"examples": {}},
        {"lengths": ["3"]},
        {"skipped": True},
        {"long": [3]},
        {"notes": {"a": -1}},
        {"dropped": []},
    ],
)
def test_a_hostile_answer_is_refused(change: dict[str, object]) -> None:
    facts, _ = SOUND.message()
    with pytest.raises((ValueError, TypeError, KeyError)):
        EncodedPart.from_message({**facts, **change}, np.array([1, 9], dtype=np.int64).tobytes())


def test_token_ids_that_are_none() -> None:
    facts, content = SOUND.message()
    with pytest.raises(ValueError, match="no token ids"):
        EncodedPart.from_message(facts, np.full(len(content) // 8, -1, dtype=np.int64).tobytes())
