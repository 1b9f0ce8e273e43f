import json
from pathlib import Path

import pytest

from chat_templates import CHATML, LLAMA2, MARKED
from offsite.data.batches import collate
from offsite.data.conversations.label_answers import END_ADDED, LAST_ANSWER_ALONE
from offsite.data.conversations.parse_messages import Turn
from offsite.data.read_rows import read_rows
from offsite.data.row import Row
from offsite.data.tokens import encode
from offsite.errors import DataError
from offsite.models.tokenizers import load_tokenizer
from tiny import tiny_tokenizer

MARKED_WITHOUT_END = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
# like Qwen3: what stands before an answer depends on whether it is the last
THINKS_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "The quick brown?"),
    Turn("assistant", "fox jumps"),
    Turn("user", "over"),
    Turn("assistant", "the lazy <dog>.\n"),
)


def tokenizer_with(folder, template, **settings):
    tiny_tokenizer(folder, **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def encoded(turns, tokenizer, **settings):
    return encode([Row(1, None, "", turns=tuple(turns), **settings)], tokenizer, source=Path("rows"), max_length=9999)


def conversation_ids(turns, tokenizer):
    (example,) = encoded(turns, tokenizer).examples
    return example.ids.tolist(), example.places.tolist()


def labelled(tokenizer, turns=TURNS):
    """The labelled stretches, decoded, and everything decoded."""
    ids, places = conversation_ids(turns, tokenizer)
    runs, run = [], []
    for place in places:
        if run and place != run[-1] + 1:
            runs.append(run)
            run = []
        run = [*run, place]
    return [tokenizer.decode([ids[i] for i in part]) for part in [*runs, run]], tokenizer.decode(ids)


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_WITHOUT_END])
def test_only_what_the_assistant_says_and_its_end_carry_labels(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    said, whole = labelled(tokenizer)
    assert said == ["fox jumps<|im_end|>", "the lazy <dog>.\n<|im_end|>"]
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)


def test_an_end_after_a_space_and_one_that_is_the_eos(tmp_path):
    tokenizer = tokenizer_with(tmp_path, LLAMA2)
    said, whole = labelled(tokenizer, TURNS[1:])
    assert said == [" fox jumps </s>", " the lazy <dog>. </s>"]
    assert whole.count("<s>") == 2  # as the template has it; nothing is added


def test_special_tokens_that_the_assistant_says_do_not_end_its_turn(tmp_path):
    turns = (Turn("user", "a"), Turn("assistant", "x <|im_end|> y"))
    assert labelled(tokenizer_with(tmp_path, CHATML), turns)[0] == ["x <|im_end|> y<|im_end|>"]


def test_a_model_is_asked_with_what_stands_before_the_labels(tmp_path):
    tokenizer = tokenizer_with(tmp_path, CHATML)
    ids, places = conversation_ids(TURNS[:3], tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS[:2]]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids[: places[0]] == asked


def test_marks_and_rendering_agree_with_the_mask_of_transformers(tmp_path):
    tokenizer = tokenizer_with(tmp_path, MARKED)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, places = conversation_ids(TURNS, tokenizer)
    assert ids == theirs["input_ids"]
    assert places == [i for i, marked in enumerate(theirs["assistant_masks"]) if marked]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (THINKS_LAST, ["fox jumps<|im_end|>", "<think></think>the lazy <dog>.\n<|im_end|>"]),
        (CHATML.partition("{% if add_generation_prompt")[0], ["fox jumps<|im_end|>", "the lazy <dog>.\n<|im_end|>"]),
        (
            MARKED.replace("{{ '\n' }}", "{% generation %}x{% endgeneration %}"),
            ["fox jumps<|im_end|>x", "the lazy <dog>.\n<|im_end|>x</s>"],
        ),
    ],
)
def test_templates_that_write_turns_in_their_own_way(tmp_path, template, said):
    assert labelled(tokenizer_with(tmp_path, template))[0] == said


def test_a_template_without_an_end_token_gets_one_behind_the_last_answer(tmp_path):
    tokenizer = tokenizer_with(tmp_path, NO_END)
    said, whole = labelled(tokenizer)
    assert [words.strip() for words in said] == ["fox jumps", "the lazy <dog>.\n\n</s>"]
    messages = [turn.message for turn in TURNS]
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False) + "</s>"
    assert encoded(TURNS, tokenizer).notes == {END_ADDED: 1}


def test_a_template_that_does_not_show_its_earlier_answers_is_learnt_by_the_last_alone(tmp_path):
    shouts = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)", 1)
    tokenizer = tokenizer_with(tmp_path, shouts)
    result = encoded(TURNS, tokenizer)
    assert labelled(tokenizer)[0] == ["the lazy <dog>.\n<|im_end|>"]
    assert result.notes == {LAST_ANSWER_ALONE: 1}


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (PICKY, "refuses it: no system turns"),
        (CHATML.replace("m['content']", "'secret'", 1), "no word of what the assistant says"),
        (CHATML.partition("{% if add_gen")[0].replace("m['content']", "m['content'] | upper"), "does not show where"),
    ],
)
def test_what_cannot_be_labelled_is_an_error(tmp_path, template, says):
    with pytest.raises(DataError, match="1 conversation of rows cannot be used") as caught:
        encoded(TURNS, tokenizer_with(tmp_path, template))
    assert says in caught.value.reasons[0]


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKS_LAST])
def test_an_assistant_that_greets_first(tmp_path, template):
    assert labelled(tokenizer_with(tmp_path, template), TURNS[2:])[0][0] == "fox jumps<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turns_that_are_not_to_be_learnt(tmp_path, template):
    turns = [*TURNS[:2], Turn("assistant", "fox jumps", learnt=False), *TURNS[3:]]
    assert labelled(tokenizer_with(tmp_path, template), turns)[0] == ["the lazy <dog>.\n<|im_end|>"]


def rows_file(folder, *conversations):
    file = folder / "chat.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}) + "\n"
            for turns in conversations
        )
    )
    return file


def test_conversations_become_batches(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", CHATML, pad="eos")
    file = rows_file(tmp_path, TURNS, TURNS[:3])
    examples = encode(read_rows(file), tokenizer, source=file, max_length=128).examples
    batch = collate(examples)
    for i, example in enumerate(examples):
        ids, places = conversation_ids((TURNS, TURNS[:3])[i], tokenizer)
        assert example.ids.tolist() == ids
        assert example.labels == len(places)
        mine = batch.owners == i
        assert batch.targets[mine].tolist() == [ids[place] for place in places]
        assert (batch.places[mine] - i * batch.ids.shape[1]).tolist() == [place - 1 for place in places]


def test_a_long_conversation_loses_its_end(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", CHATML)
    file = rows_file(tmp_path, TURNS, TURNS[1:3])
    with pytest.raises(DataError, match="over the longest"):
        encode(read_rows(file), tokenizer, source=file, max_length=48)
    ids, places = conversation_ids(TURNS, tokenizer)
    cut = encode(read_rows(file), tokenizer, source=file, max_length=places[0] + 2, long_rows="truncate")
    assert cut.examples[0].ids.tolist() == ids[: places[0] + 2]
    assert cut.examples[0].labels == 2
    short = encode(read_rows(file), tokenizer, source=file, max_length=places[0], long_rows="truncate")
    assert ([example.line for example in short.examples], short.skipped) == ([2], 1)  # no label was left


def test_every_conversation_that_the_template_refuses_is_listed(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", PICKY)
    file = rows_file(tmp_path, TURNS, TURNS[1:], TURNS)
    with pytest.raises(DataError, match="2 conversations") as caught:
        encode(read_rows(file), tokenizer, source=file, max_length=128)
    assert [reason.partition(": ")[0] for reason in caught.value.reasons] == [f"{file}:1", f"{file}:3"]
    assert "messages" in caught.value.reasons[0]


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", None)
    file = rows_file(tmp_path, TURNS)
    with pytest.raises(DataError, match="no chat template"):
        encode(read_rows(file), tokenizer, source=file, max_length=128)
