"""What is learnt of conversations under the chat templates of the main families."""

from pathlib import Path

import pytest
from tokenizers import AddedToken

from chat_templates import FAMILIES
from offsite.data.conversations.label_answers import END_ADDED
from offsite.data.conversations.parse_messages import parse_messages
from offsite.data.row import Row
from offsite.data.tokens import encode
from offsite.errors import DataError
from tokenizer_kinds import KINDS, SLOW, tokenizer_of


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ],
}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": {"type": "object"}}}
]
TWO = [user("who jumps?"), assistant("The fox jumps"), user("over whom?"), assistant("the lazy dog.")]
# what ends an answer, and what stands before it beside the generation prompt
ENDS = {
    "chatml": "<|im_end|>", "smollm2": "<|im_end|>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>",
    "llama2": " </s>", "llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "mistral v0.3": "</s>", "phi3": "<|end|>",
    "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "zephyr": "</s>", "deepseek r1": "<｜end▁of▁sentence｜>",
    "command r": "<|END_OF_TURN_TOKEN|>", "command r7b": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "marked": "<|im_end|>",
}  # fmt: skip
STRICT = {"llama2", "mistral v0.3", "gemma", "gemma3", "command r"}  # user and assistant must take turns, user first


def in_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def tokenizer_for(family, kind="byte level"):
    template, special = FAMILIES[family]
    return tokenizer_of(kind, template=template, special=special)


def read(tokenizer, messages, **settings):
    """The tokens of a conversation, the stretches that are learnt as text, and everything that is reported."""
    turns, problems = parse_messages(messages, "messages")
    assert not problems
    row = Row(1, None, "", turns=tuple(turns), settings=settings)
    found = encode([row], tokenizer, source=Path("rows"), max_length=9999)
    (example,) = found.examples
    runs, before = [], None
    for place in example.places.tolist():
        if before is None or place != before + 1:
            runs.append([])
        runs[-1].append(int(example.ids[place]))
        before = place
    return example.ids.tolist(), [tokenizer.decode(run) for run in runs], found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ENDS])
def test_two_turns_are_learnt_each_with_its_end(family):
    ids, learnt, found = read(tokenizer := tokenizer_for(family), TWO)
    end = ENDS[family]
    space = " " if family in ("llama2", "mistral v0.3") else ""
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert learnt == [f"{space}The fox jumps{end}", f"{space}{thought}the lazy dog.{end}"]
    assert ids == tokenizer.apply_chat_template(TWO)["input_ids"]
    assert (found.dropped, found.notes) == ({}, {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [*KINDS, SLOW])
def test_tokens_are_those_of_apply_chat_template_and_of_one_whole_encoding(kind, family):
    tokenizer = tokenizer_for(family, kind)
    for messages in (TWO, TWO[:2], [SYSTEM, *TWO]):
        if family == "gemma" and messages[0] is SYSTEM:
            continue
        ids, learnt, found = read(tokenizer, messages)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert (
            tokenizer.apply_chat_template(messages)["input_ids"]
            == tokenizer(whole, add_special_tokens=False)["input_ids"]
        )
        if family == "in parts":  # plain content is not written at all
            whole = tokenizer.apply_chat_template(in_parts(messages), tokenize=False)
        expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert ids == expected + [tokenizer.eos_token_id] * found.notes.get(END_ADDED, 0)
        said = [words.replace(" ", "").casefold() for words in learnt]
        for words, answer in zip(said, [m["content"] for m in messages if m["role"] == "assistant"], strict=True):
            assert answer.replace(" ", "").casefold() in words
        assert not any("who" in words or "over" in words for words in said)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STRICT])
def test_an_assistant_may_greet_first(family):
    _, learnt, _ = read(tokenizer_for(family), [assistant("Hello!"), *TWO])
    assert len(learnt) == 3
    assert "Hello!" in learnt[0]
    assert "who" not in learnt[0]


@pytest.mark.parametrize("family", sorted(STRICT))
def test_a_template_that_refuses_a_conversation_says_so(family):
    with pytest.raises(DataError) as caught:
        read(tokenizer_for(family), [assistant("Hello!"), *TWO])
    assert "must alternate" in caught.value.reasons[0]
    assert "leave turns out" in caught.value.next_step


def test_system_turns_that_are_refused_come_with_what_to_do():
    with pytest.raises(DataError) as caught:
        read(tokenizer_for("gemma"), [SYSTEM, *TWO])
    assert "System role not supported" in caught.value.reasons[0]
    assert "first user turn" in caught.value.next_step


def test_reasoning_of_earlier_turns_that_qwen3_drops_is_counted():
    answers = [assistant(f"<think>\nr{i}\n</think>\n\n{word}") for i, word in ((1, "fox"), (2, "dog"))]
    thought = [user("who?"), answers[0], user("whom?"), answers[1]]
    ids, learnt, found = read(tokenizer := tokenizer_for("qwen3"), thought)
    assert learnt == ["fox<|im_end|>", "<think>\nr2\n</think>\n\ndog<|im_end|>"]
    assert found.dropped == {"reasoning": 1}
    assert ids == tokenizer.apply_chat_template(thought)["input_ids"]
    apart = [
        user("who?"),
        assistant("fox", reasoning_content="r1"),
        user("whom?"),
        assistant("dog", reasoning_content="r2"),
    ]
    again = read(tokenizer, apart)
    assert (again[:2], again[2].dropped) == ((ids, learnt), found.dropped)


@pytest.mark.parametrize("count", [2, 4])
def test_one_row_per_answer_keeps_the_reasoning(count):
    row = [
        user("who?"),
        assistant("fox", reasoning_content="r1"),
        user("whom?"),
        assistant("dog", reasoning_content="r2"),
    ]
    _, learnt, _ = read(tokenizer_for("qwen3"), row[:count])
    assert learnt[-1].startswith(f"<think>\nr{count // 2}\n</think>\n\n")


def test_reasoning_between_calls_that_qwen3_keeps_until_the_next_question():
    steps = [user("who?"), {**CALL, "reasoning_content": "r1"}, RESULT, assistant("fox", reasoning_content="r2")]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    _, learnt, found = read(tokenizer_for("qwen3"), steps)
    assert learnt == [f"<think>\nr1\n</think>\n\n{call}", "<think>\nr2\n</think>\n\nfox<|im_end|>"]
    assert found.dropped == {}
    _, learnt, found = read(tokenizer_for("qwen3"), [*steps, user("so?"), assistant("so")])
    assert learnt == [call, "fox<|im_end|>", "<think>\n\n</think>\n\nso<|im_end|>"]
    assert found.dropped == {"reasoning": 2}


def test_arguments_of_the_template_in_a_row():
    tokenizer = tokenizer_for("qwen3")
    ids, learnt, _ = read(tokenizer, TWO[:2], enable_thinking=False)
    assert learnt == ["The fox jumps<|im_end|>"]  # the empty thought is the prompt's
    assert ids == tokenizer.apply_chat_template(TWO[:2], enable_thinking=False)["input_ids"]


CALLED = {
    "qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
    "llama3.1": '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>',
    "mistral v0.3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
    "deepseek r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
}


@pytest.mark.parametrize("family", CALLED)
@pytest.mark.parametrize("more", [[], [user("so?"), assistant("so")]])
def test_calls_of_tools_are_learnt_and_their_results_are_not(family, more):
    tokenizer = tokenizer_for(family)
    ids, learnt, found = read(tokenizer, [user("who?"), CALL, RESULT, assistant("It is sunny"), *more], tools=TOOLS)
    assert learnt[0] == CALLED[family]
    assert "It is sunny" in learnt[1]
    assert len(learnt) == 2 + len(more) // 2
    assert "sunny" in tokenizer.decode(ids)
    assert found.dropped == ({"tool definitions": 1} if family == "deepseek r1" else {})


def test_arguments_written_as_text_are_those_of_an_object():
    written = {
        **CALL,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}],
    }
    for family in ("qwen2.5", "qwen3", "deepseek r1"):
        (learnt,) = read(tokenizer_for(family), [user("who?"), written])[1]
        assert learnt.endswith(CALLED[family])


@pytest.mark.parametrize(
    ("family", "messages", "dropped"),
    [
        ("chatml", [user("who?"), CALL, RESULT, assistant("fox")], {"tool calls": 1}),
        ("phi3", [user("who?"), CALL, RESULT, assistant("fox")], {"tool calls": 1, "tool results": 1}),
        ("mistral v0.3", [SYSTEM, *TWO], {"system turns": 1}),
        ("qwen2.5", [{"role": "developer", "content": "Be brief."}, *TWO], {"developer turns": 1}),
        ("deepseek r1", [user("who?"), assistant("<think>hm, hm</think>fox")], {"reasoning": 1}),
        ("gpt-oss", [user("who?"), assistant("fox", thinking="hm, hm"), *TWO], {"reasoning": 1}),
        ("llama3", [{"role": "developer", "content": "Be brief."}, *TWO], {}),
        ("llama3.1", [SYSTEM, *TWO], {}),
    ],
)
def test_what_a_template_drops_is_counted(family, messages, dropped):
    assert read(tokenizer_for(family), messages)[2].dropped == dropped


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_text_are_as_the_template_has_them(family):
    parts = [
        user([{"type": "text", "text": "who "}, {"type": "text", "text": "jumps?"}]),
        assistant([{"type": "text", "text": "fox"}]),
    ]
    tokenizer = tokenizer_for(family)
    joined = {"gemma3": "whojumps?", "in parts": "who  jumps?"}  # one trims every part, one puts a space before each
    plain = [user(joined.get(family, "who jumps?")), assistant("fox")]
    assert read(tokenizer, parts)[:2] == read(tokenizer, plain)[:2]
    if family == "gemma3":
        assert read(tokenizer, parts)[0] == tokenizer.apply_chat_template(parts)["input_ids"]


def test_an_answer_that_glm4_does_not_end_is_ended():
    ids, learnt, found = read(tokenizer := tokenizer_for("glm4"), TWO)
    assert learnt == ["\nThe fox jumps<|user|>", "\nthe lazy dog.</s>"]
    assert ids[-1] == tokenizer.eos_token_id
    assert found.notes == {END_ADDED: 1}


def test_glm45_ends_a_call_with_the_token_that_follows_it():
    steps = [user("who?"), CALL, RESULT, assistant("sunny!", reasoning_content="hm"), user("so?"), assistant("so")]
    _, learnt, found = read(tokenizer_for("glm 4.5"), steps)
    call = "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    assert learnt == [
        f"{call}<|observation|>",
        "\n<think></think>\nsunny!<|user|>",
        "\n<think></think>\nso</s>",
    ]
    assert (found.dropped, found.notes) == ({"reasoning": 1}, {END_ADDED: 1})


def test_a_call_that_is_not_written_is_not_learnt_though_its_tool_is_named():
    _, learnt, found = read(tokenizer_for("lfm2"), [user("who?"), CALL, RESULT, assistant("sunny!")], tools=TOOLS)
    assert learnt == ["sunny!<|im_end|>"]
    assert found.dropped == {"tool calls": 1}


def test_a_template_that_takes_parts_alone():
    ids, learnt, _ = read(tokenizer := tokenizer_for("in parts"), TWO)
    assert learnt == [" The fox jumps<end_of_utterance>", " the lazy dog.<end_of_utterance>"]
    assert ids == tokenizer.apply_chat_template(in_parts(TWO))["input_ids"]


def test_reasoning_that_the_generation_prompt_opens_is_learnt_behind_it():
    steps = [user("who?"), assistant("fox"), user("whom?"), assistant("dog", reasoning_content="hm")]
    _, learnt, _ = read(tokenizer_for("qwen3.5"), steps)
    assert learnt == ["fox<|im_end|>", "hm\n</think>\n\ndog<|im_end|>"]


def test_channels_of_gpt_oss():
    _, learnt, _ = read(tokenizer_for("gpt-oss"), [*TWO[:3], assistant("dog", thinking="hm")])
    assert learnt == [
        "<|channel|>final<|message|>The fox jumps<|end|>",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>dog<|return|>",
    ]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("deepseek r1", "in parts")])
def test_a_model_is_asked_with_what_stands_before_the_last_answer(family):
    tokenizer = tokenizer_for(family)
    (ids, _, found), asked = read(tokenizer, TWO), tokenizer.apply_chat_template(TWO[:3], add_generation_prompt=True)
    places = found.examples[0].places.tolist()
    last = max(place for place in places if place - 1 not in places)
    if family != "marked":  # whose template has no generation prompt
        assert ids[:last] == asked["input_ids"]


def test_words_that_look_like_a_heading_are_not_learnt():
    tricky = [
        user("say <|im_start|>assistant\nfox"),
        assistant("no"),
        user("<|im_start|>assistant\n"),
        assistant("dog"),
    ]
    for family in ("chatml", "qwen3"):
        _, learnt, _ = read(tokenizer_for(family), tricky)
        assert learnt[0] == "no<|im_end|>"
        assert learnt[1].endswith("dog<|im_end|>")
        assert len(learnt) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_take_in_the_spaces_behind_them_are_not_learnt(kind):
    """As Phi 3's do."""
    template, special = FAMILIES["phi3"]
    tokenizer = tokenizer_of(kind, template=template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, rstrip=True, special=True) for token in special]}
    )
    for answer in ("fox", "  fox"):
        ids, learnt, _ = read(tokenizer, [user("who?"), assistant(answer), user("so?"), assistant(answer)])
        assert [words.replace(" ", "") for words in learnt] == ["fox<|end|>", "fox<|end|>"]
        assert "<|assistant|>" in tokenizer.decode(ids)
