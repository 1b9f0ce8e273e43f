"""Rows have the tokens of one whole encoding, whatever the tokenizer."""

from pathlib import Path

import pytest

from offsite.data.parse_row import parse_row
from offsite.data.row import Row
from offsite.data.tokens import encode, encode_choices, encode_prompt
from offsite.errors import IncompatibleError
from tokenizer_kinds import KINDS, SLOW, tokenizer_of

ROWS = [
    ("Question: who jumps?\nAnswer:", " lions"),
    ("Question: who jumps? ", "the fox"),
    ("double  ", "  spaces  and\n\nlines "),
    ("", "The quick brown fox"),
    ("naïve é ", "ü ﬁ 🦊 x"),
    ("The quick br", "own fox"),
    ("a\n", "\nb"),
]


def encoded(rows, tokenizer, **settings):
    return encode(rows, tokenizer, source=Path("rows"), max_length=999, **settings).examples


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_prompt_and_completion_are_encoded_as_one_text(kind, adds_bos):
    tokenizer = tokenizer_of(kind, adds_bos=adds_bos)
    for (prompt, completion), example in zip(ROWS, encoded([Row(1, *row) for row in ROWS], tokenizer), strict=True):
        whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        ids = example.ids.tolist()
        assert ids == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert ids[example.labelled[-1]] == tokenizer.eos_token_id
        assert encode_prompt(Row(1, prompt, completion), tokenizer) == ids[: example.given]


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_labels_begin_with_the_completion(kind):
    tokenizer = tokenizer_of(kind)
    for prompt, completion in ROWS:
        (example,) = encoded([Row(1, prompt, completion)], tokenizer)
        ids = example.ids.tolist()
        given = tokenizer.decode(ids[1 : example.given]).strip()
        learnt = tokenizer.decode(ids[example.given : -1])
        if kind == "word piece" or "ﬁ" in completion:  # these write the text in another form
            continue
        assert prompt.startswith(given)
        assert len(given) >= len(prompt.rstrip()) - 3  # a token across the border is learnt
        assert learnt.strip().endswith(completion.strip())


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_what_a_template_like_prefix_mark_would_change(kind):
    """A completion that follows without a space has no mark before it, and one with a space has one."""
    tokenizer = tokenizer_of(kind)
    for completion in ("fox", " fox"):
        (example,) = encoded([Row(1, "jumps:", completion)], tokenizer)
        whole = tokenizer("jumps:" + completion, add_special_tokens=False)["input_ids"]
        assert example.ids[1:-1].tolist() == whole


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_choices_are_encoded_with_their_question(kind):
    tokenizer = tokenizer_of(kind)
    question = {"question": "who jumps?", "choices": ["lions", "the lazy dog", "é"], "answer": 1}
    row = parse_row(question, 1)
    (choices,) = encode_choices([row], tokenizer, source=Path("rows"), max_length=999)
    for example, choice in zip(choices.examples, question["choices"], strict=True):
        whole = tokenizer(f"Question: who jumps?\nAnswer: {choice}", add_special_tokens=False)["input_ids"]
        assert example.ids.tolist() == [tokenizer.bos_token_id, *whole]
        asked = tokenizer("Question: who jumps?\nAnswer:", add_special_tokens=False)["input_ids"]
        shared = example.ids[1 : example.given].tolist()
        assert shared == whole[: len(shared)]
        assert len(shared) >= len(asked) - 1
    (tuned,) = encoded([row], tokenizer)
    assert tuned.ids.tolist() == [*choices.examples[1].ids.tolist(), tokenizer.eos_token_id]


def test_a_text_is_encoded_as_it_is():
    for kind in (*KINDS, SLOW):
        tokenizer = tokenizer_of(kind)
        (example,) = encoded([Row(1, None, " The  quick")], tokenizer)
        assert example.ids[1:-1].tolist() == tokenizer(" The  quick", add_special_tokens=False)["input_ids"]
        assert example.given == 1


class Turning:
    """A tokenizer without offsets that writes a text backwards: no border can be found in it."""

    is_fast, chat_template, bos_token_id, eos_token_id, bos_token, eos_token = False, None, None, 2, None, "</s>"
    added_tokens_decoder, all_special_tokens = {}, ()

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in reversed(text)]}


def test_a_slow_tokenizer_that_hides_the_border_is_refused():
    with pytest.raises(IncompatibleError, match="labels cannot be placed") as caught:
        encoded([Row(1, "The quick brown", " fox")], Turning())
    assert "tokenizer.json" in caught.value.next_step
