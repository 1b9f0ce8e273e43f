import json
from itertools import pairwise

import numpy as np
import pytest

from chat_templates import CHATML
from offsite.data.batches import collate
from offsite.data.read_rows import read_rows
from offsite.data.row import Row
from offsite.data.tokens import encode, encode_choices, encode_prompt
from offsite.errors import DataError
from offsite.models.tokenizers import load_tokenizer
from tiny import tiny_rows, tiny_tokenizer


def tokenizer_in(folder, **settings):
    tiny_tokenizer(folder, **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


def write(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def encoded(folder, tokenizer, *lines, max_length=64, long_rows="error"):
    file = write(folder, *lines)
    return encode(read_rows(file), tokenizer, source=file, max_length=max_length, long_rows=long_rows)


def test_rows_of_both_kinds_are_read_with_their_lines(tmp_path):
    file = write(tmp_path, b"\xef\xbb\xbf" + b'{"text": "a"}', b"", {"prompt": "", "completion": "b"}, b"  ")
    rows = read_rows(file)
    assert [(row.line, row.prompt, row.completion) for row in rows] == [(1, None, "a"), (3, "", "b")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a", "text": "b"}', "twice"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ([1], "list"),
        ({"txt": "a"}, "'txt'"),
        ({"text": "a", "prompt": "b"}, "'prompt', 'text'"),
        ({"prompt": "a"}, "expected 'text', or 'prompt' and 'completion'"),
        ({"text": 3}, "field 'text' is int"),
        ({"prompt": "a", "completion": None}, "field 'completion' is NoneType"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"text": "\ud800"}, "surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, line, says):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, {"text": "good"}, line))
    (reason,) = caught.value.reasons
    assert f"{tmp_path / 'rows.jsonl'}:2: " in reason
    assert says in reason


def test_all_bad_rows_are_counted_and_twenty_listed(tmp_path):
    with pytest.raises(DataError, match="25 bad rows") as caught:
        read_rows(write(tmp_path, {"text": "good"}, *[{"text": i} for i in range(25)]))
    assert len(caught.value.reasons) == 21
    assert caught.value.reasons[-1] == "and 5 more"


def test_an_empty_or_missing_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="empty"):
        read_rows(write(tmp_path, b"", b" "))
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize("settings", [{}, {"adds_bos": False}, {"pad": "eos"}])
def test_exactly_one_bos_and_a_labelled_eos(tmp_path, settings):
    tokenizer = tokenizer_in(tmp_path, **settings)
    (example,) = encoded(tmp_path, tokenizer, {"prompt": "The quick", "completion": " brown fox"}).examples
    ids = example.ids.tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[1 : example.given]) == "The quick"
    assert tokenizer.decode(ids[example.given : -1]) == " brown fox"


def test_a_tokenizer_without_bos_gets_none(tmp_path):
    tokenizer = tokenizer_in(tmp_path, bos=False)
    prompt, text = encoded(tmp_path, tokenizer, {"prompt": "The", "completion": " fox"}, {"text": "The fox"}).examples
    assert tokenizer.decode(prompt.ids[:-1]) == "The fox"
    assert text.given == 1  # nothing predicts the first token


def test_ends_that_the_row_brings_are_not_doubled(tmp_path, tokenizer):
    (example,) = encoded(tmp_path, tokenizer, {"prompt": "<s>The", "completion": " fox</s>"}).examples
    ids = example.ids.tolist()
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)


def test_a_generating_model_is_given_what_tuning_put_before_the_answer(tmp_path, tokenizer):
    (example,) = encoded(tmp_path, tokenizer, {"prompt": "The quick", "completion": " brown"}).examples
    assert encode_prompt(Row(1, "The quick", " brown"), tokenizer) == example.ids[: example.given].tolist()


def test_a_token_across_the_border_is_learnt(tmp_path, tokenizer):
    (example,) = encoded(tmp_path, tokenizer, {"prompt": "fox Th", "completion": "e fox"}).examples
    whole = tokenizer("fox The fox", add_special_tokens=False)["input_ids"]
    assert example.ids.tolist() == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    assert tokenizer.decode(example.ids[1 : example.given]).strip() == "fox"
    assert encode_prompt(Row(1, "fox Th", "e fox"), tokenizer) == example.ids[: example.given].tolist()


def test_a_text_is_labelled_throughout(tmp_path, tokenizer):
    (example,) = encoded(tmp_path, tokenizer, {"text": "The quick"}).examples
    assert example.given == 1
    assert example.labels == len(example.ids) - 1


def test_long_rows_are_listed_cut_or_skipped(tmp_path, tokenizer):
    lines = ({"text": "The"}, {"prompt": "lazy " * 20, "completion": " dog."}, {"text": "fox " * 40})
    with pytest.raises(DataError, match="2 rows") as caught:
        encoded(tmp_path, tokenizer, *lines, max_length=12)
    assert "rows.jsonl:2: " in caught.value.reasons[0]
    assert "at most 12" in caught.value.reasons[0]
    assert 'long_rows = "truncate"' in caught.value.next_step
    skipped = encoded(tmp_path, tokenizer, *lines, max_length=12, long_rows="skip")
    assert ([example.line for example in skipped.examples], skipped.skipped) == ([1], 2)
    cut = encoded(tmp_path, tokenizer, *lines, max_length=12, long_rows="truncate").examples
    assert [len(example.ids) for example in cut[1:]] == [12, 12]
    assert cut[1].ids[0] == tokenizer.bos_token_id
    assert cut[1].ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(cut[1].ids[cut[1].given : -1]) == " dog."  # the prompt's start went, the answer stayed
    assert cut[2].ids[-1] != tokenizer.eos_token_id


def test_a_completion_longer_than_everything_keeps_its_start(tmp_path, tokenizer):
    row = {"prompt": "The", "completion": " quick brown fox jumps over the lazy dog."}
    (example,) = encoded(tmp_path, tokenizer, row, max_length=8, long_rows="truncate").examples
    assert (len(example.ids), example.given) == (8, 1)
    assert tokenizer.decode(example.ids[1:]).startswith(" qu")


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no row") as caught:
        encoded(tmp_path, tokenizer, {"text": "fox " * 40}, max_length=8, long_rows="skip")
    assert 'long_rows = "truncate"' in caught.value.next_step


def test_padding_is_known_by_length_and_never_by_id(tmp_path):
    tokenizer = tokenizer_in(tmp_path, pad="eos")
    rows = read_rows(tiny_rows(tmp_path / "r.jsonl", 4))
    examples = encode(rows, tokenizer, source=tmp_path, max_length=64).examples
    batch = collate(examples)
    assert batch.mask.sum() == sum(len(example.ids) - 1 for example in examples)
    assert sum(batch.targets == tokenizer.eos_token_id) == 4  # every EOS is a label, though it is the padding's id too


def text_file(folder, text):
    file = folder / "book.txt"
    file.write_text(text)
    return file


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [8, 9, 1000])
def test_a_long_text_is_cut_into_blocks_without_a_loss(tmp_path, bos, length):
    tokenizer = tokenizer_in(tmp_path / "tokenizer", bos=bos)
    text = "The quick brown fox\n\n  jumps över the lazy dog. " * 5
    file = text_file(tmp_path, text)
    encoded = encode(read_rows(file), tokenizer, source=file, max_length=length)
    examples = encoded.examples
    whole = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labelled = np.concatenate([example.ids[example.labelled] for example in examples]).tolist()
    assert labelled == (whole if bos else whole[1:])  # nothing predicts the first token of all
    assert [example.line for example in examples] == list(range(1, len(examples) + 1))
    assert all(len(example.ids) == length for example in examples[:-1])
    assert len(examples[-1].ids) <= length
    assert encoded.skipped == 0
    for before, after in pairwise(examples):
        assert after.ids[0] == (tokenizer.bos_token_id if bos else before.ids[-1])


def test_the_ends_that_a_long_text_brings_are_not_doubled(tmp_path, tokenizer):
    file = text_file(tmp_path, "<s>The fox</s>")
    (example,) = encode(read_rows(file), tokenizer, source=file, max_length=32).examples
    assert tokenizer.decode(example.ids) == "<s>The fox</s>"


def test_a_choice_is_scored_on_its_own_tokens(tmp_path, tokenizer):
    question = {"question": "What jumps?", "choices": ["the fox", "dog", "ö"], "answer": 1}
    file = write(tmp_path, {"text": "a"}, question)
    rows = read_rows(file)
    (choices,) = encode_choices(rows, tokenizer, source=file, max_length=64)
    assert (choices.line, choices.answer, choices.lengths) == (2, 1, (7, 3, 1))
    asked = encode_prompt(Row(1, "Question: What jumps?\nAnswer:", " x"), tokenizer)
    for example, choice in zip(choices.examples, question["choices"], strict=True):
        assert example.ids[: example.given].tolist() == asked
        assert tokenizer.decode(example.ids[example.given :]) == f" {choice}"
    tuned = encode(rows, tokenizer, source=file, max_length=64).examples[1]
    assert tuned.ids.tolist() == [*choices.examples[1].ids.tolist(), tokenizer.eos_token_id]
    assert tuned.given == choices.examples[1].given


def test_long_choices_are_listed_cut_or_skipped(tmp_path, tokenizer):
    file = write(tmp_path, {"question": "q", "choices": ["x", "fox " * 30], "answer": 0})
    with pytest.raises(DataError, match="longest length") as caught:
        encode_choices(read_rows(file), tokenizer, source=file, max_length=30)
    assert f"{file}:1: " in caught.value.reasons[0]
    assert encode_choices(read_rows(file), tokenizer, source=file, max_length=30, long_rows="skip") == []
    (cut,) = encode_choices(read_rows(file), tokenizer, source=file, max_length=30, long_rows="truncate")
    assert [len(example.ids) for example in cut.examples][1] == 30


def test_an_instruction_without_an_output_is_left_out(tmp_path, tokenizer):
    lines = [{"instruction": "Add.", "input": "1 1", "output": output} for output in ("2", "")]
    found = encoded(tmp_path, tokenizer, *lines, max_length=600)
    assert ([example.line for example in found.examples], found.skipped) == ([1], 1)
    with pytest.raises(DataError, match=r"no row of .* is left"):
        encoded(tmp_path, tokenizer, lines[1], max_length=600)


def test_an_instruction_is_a_conversation_where_there_is_a_template(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    line = {"instruction": "Add.", "input": "1 1", "output": "2"}
    (plain,) = encoded(tmp_path, tokenizer, line, max_length=600).examples
    assert tokenizer.decode(plain.ids).startswith("<s>Below is an instruction that describes a task, paired with")
    assert tokenizer.decode(plain.ids[plain.labelled]) == "2</s>"
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (chat,) = encoded(tmp_path, tokenizer, line, max_length=600).examples
    asked = [{"role": "user", "content": "Add.\n1 1"}, {"role": "assistant", "content": "2"}]
    assert chat.ids.tolist() == tokenizer.apply_chat_template(asked)["input_ids"]
    assert tokenizer.decode(chat.ids[chat.labelled]) == "2<|im_end|>"
    (row,) = read_rows(write(tmp_path, line))
    asked_ids = tokenizer.apply_chat_template(asked[:1], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(row, tokenizer) == asked_ids
