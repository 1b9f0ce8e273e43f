"""Records -> rows: interprets the fields of a data set. docs/data.md shows an example of every kind of row.

{"messages"} or {"conversations"}     a conversation, labels on the assistant's answers
{"chosen", "rejected"}                preferences; the chosen answer is used if the user asks for it
{"question", "choices", "answer"}     multiple choice; tuned on the right choice, scored on all choices
{"instruction", "input", "output"}    an instruction: a conversation of two turns if the tokenizer has a chat template
{"prompt", "completion"}              labels on the completion
{"text"}                              a plain text, labels on all of it
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offsite.data.conversations.parse_messages import (
    Turn,
    kind_of,
    parse_messages,
    parse_tools,
    parsed_json,
    text_problem,
)
from offsite.data.parquet_and_arrow import ClassNumber
from offsite.data.row import Row, RowForm

Fields = Mapping[str, Any]

_MESSAGES = ("messages", "conversations", "conversation")
_OUTPUTS = ("output", "response")
_INPUTS = ("input", "context")
_ANSWERS = ("answer", "answerKey")
_KTO = ("kto_tag", "label")  # next to an answer: whether it is a good one
_UNWANTED = "rows left out because their label is false (answers that are not wanted)"
FIELDS = frozenset(
    {
        *("text", "prompt", "completion", "question", "choices", "instruction", "system", "history", "tools"),
        *("chosen", "rejected", "chat_template_kwargs", "documents"),
        *_KTO,
        *_MESSAGES,
        *_OUTPUTS,
        *_INPUTS,
        *_ANSWERS,
    }
)  # the fields of all kinds of rows
_EXPECTED = (
    "expected 'text', or 'prompt' and 'completion', or 'messages', or 'instruction' and 'output', "
    "or 'question', 'choices' and 'answer'"
)
# The prompts of Stanford Alpaca, for models without a chat template
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def question_prompt(question: str) -> str:
    """The prompt of a multiple-choice question, in tuning and in evaluation."""
    return f"Question: {question}\nAnswer:"


def choice_completion(choice: str) -> str:
    """A choice as the completion that follows the prompt of `question_prompt`."""
    return f" {choice}"


def parse_row(fields: Fields, number: int, form: RowForm | None = None) -> Row | str:
    """Parse a record of a data set; returns the row, or a text that lists everything that is wrong with the record.

    Fields that belong to no kind of row are ignored.

    Args:
        fields: the fields of the record.
        number: the number of the record in its file, from 1.
        form: the settings that say what the fields mean; None: their names alone say it.
    """
    form = form or RowForm()
    missing = [f"{theirs!r}" for theirs in form.columns.values() if theirs not in fields]
    if missing:
        return f"no field {' or '.join(missing)}, which --columns names; fields {_names(fields)}"
    own = {name: value for name, value in fields.items() if name in FIELDS and name not in form.columns}
    named = {ours: _as_named(fields[theirs]) for ours, theirs in form.columns.items()}
    if named.keys() & {"prompt", "completion"}:
        own.pop("text", None)
    # first try the columns in --columns alone; if they do not make a row, also use the data set's other fields
    for known in ([named] if named else []) + [{**own, **named}]:
        filled = {name: value for name, value in known.items() if value is not None and value != []}
        for candidate in (filled, known):  # first without nulls, as a table has them; then with, for the error text
            if (parse := _kind(candidate, form)) is not None:
                row = parse(candidate, number)
                return _marked(row, own | named, form) if isinstance(row, Row) else row
    if "chosen" in own | named and not form.chosen:
        return "preferences ('chosen' and 'rejected'); --chosen takes the chosen answers"
    return f"fields {_names(fields)}; {_EXPECTED}"


def with_our_names(fields: Fields, form: RowForm) -> dict[str, Any]:
    """A record whose fields that --columns names are renamed to our field names.

    Fields that would mean something else under their own names are left out.
    """
    if not form.columns:
        return dict(fields)
    named = {ours: _as_named(fields[theirs]) for ours, theirs in form.columns.items()}
    if _kind(named, form) is not None:
        return named
    return {name: value for name, value in fields.items() if name not in form.columns.values()} | named


def _marked(row: Row, fields: Fields, form: RowForm) -> Row:
    """The row, marked as left out if its `label` or `kto_tag` says that its answer is bad, as in KTO's data sets.

    The `label` of a plain text or of a question with choices is something else, and so is one that --columns names as
    another field.
    """
    if row.choices or (row.prompt is None and not row.turns):
        return row
    free = [name for name in _KTO if name not in form.columns.values()]
    label = next((fields[name] for name in free if fields.get(name) is not None), None)
    unwanted = label is False or (type(label) is int and label == 0)
    unwanted = unwanted or (isinstance(label, str) and label.strip().lower() == "false")
    return replace(row, left_out=_UNWANTED) if unwanted else row


def _names(fields: Fields) -> str:
    """The names of the first six fields in alphabetical order, for error messages."""
    return ", ".join(repr(name)[:40] for name in sorted(fields, key=str)[:6]) or "none"


def _as_named(value: object) -> object:
    """The value of a column that --columns names: numbers become text, all other values remain as they are."""
    if isinstance(value, ClassNumber):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _kind(fields: Fields, form: RowForm) -> Callable[[Fields, int], Row | str] | None:
    """The function that parses rows with these fields; None if the fields fit no kind of row, or several kinds."""
    names = set(fields)
    if form.chosen and "chosen" in names:
        return _preference
    if names & set(_MESSAGES):
        return _conversation
    if {"question", "choices"} <= names and names & set(_ANSWERS):
        return _multiple_choice
    if "instruction" in names and names & set(_OUTPUTS):
        return _instruction
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        return _prompted_conversation
    if names & {"text", "prompt", "completion"} in ({"text"}, {"prompt", "completion"}):
        return _text
    return None


def _text(fields: Fields, number: int) -> Row | str:
    """The row of a plain text, or of a prompt and a completion; an error text if a field is not text.

    `number` is the number of the record in its file.
    """
    taken = {name: _as_text(fields[name]) for name in ("prompt", "completion", "text") if name in fields}
    problems = [found for name, value in taken.items() if (found := text_problem(name, value, empty=name == "prompt"))]
    if problems:
        return "; ".join(problems)
    if "text" in taken:
        return Row(number, None, taken["text"])
    if system := _system(fields):
        turns = (*system, Turn("user", taken["prompt"]), Turn("assistant", taken["completion"]))
        return Row(number, f"{system[0].content}\n\n{taken['prompt']}", taken["completion"], turns=turns)
    return Row(number, taken["prompt"], taken["completion"])


def _as_text(value: Any) -> Any:
    """The name of a class if the value is the number of one; any other value unchanged."""
    return value.name if isinstance(value, ClassNumber) else value


def _system(fields: Fields) -> tuple[Turn, ...]:
    """The system turn from the field `system`, as a tuple; empty if the field contains no text."""
    value = fields.get("system")
    return (Turn("system", value),) if isinstance(value, str) and value.strip() else ()


def _settings(fields: Fields) -> dict[str, Any] | str:
    """A row's arguments for the chat template, such as tools and documents; an error text if they are malformed."""
    tools = parse_tools(fields.get("tools"))
    if isinstance(tools, str):
        return tools
    more = parsed_json(fields.get("chat_template_kwargs"))
    if more is not None and not isinstance(more, Mapping):
        return f"field 'chat_template_kwargs' is {kind_of(more)}, expected an object"
    documents = parsed_json(fields.get("documents"))
    taken = {"tools": tools, "documents": documents if isinstance(documents, list) else None}
    return {name: value for name, value in taken.items() if value} | dict(more or {})


def _of_turns(turns: list[Turn], number: int, fields: Fields, name: str) -> Row | str:
    """The row of a conversation; an error text if no turn has labels or the template's arguments are bad.

    `name` is the field of the conversation, for error messages; `number` is the number of the record in its file.
    """
    settings = _settings(fields)
    if isinstance(settings, str):
        return settings
    if turns[0].role != "system":
        turns = [*_system(fields), *turns]
    if not any(turn.role == "assistant" and turn.learnt for turn in turns):
        return f"field {name!r} has no assistant turn, so nothing to learn"
    return Row(number, None, "", turns=tuple(turns), settings=settings)


def _conversation(fields: Fields, number: int) -> Row | str:
    """The row of a conversation in one field; an error text if its messages are malformed.

    `number` is the number of the record in its file.
    """
    name = next(name for name in _MESSAGES if name in fields)
    turns, problems = parse_messages(fields[name], name)
    return "; ".join(problems) if problems else _of_turns(turns, number, fields, name)


def _prompted_conversation(fields: Fields, number: int) -> Row | str:
    """The row of a conversation in two fields, whose prompt has no labels; an error text if it is malformed.

    `number` is the number of the record in its file.
    """
    asked, problems = parse_messages(fields["prompt"], "prompt")
    answered, others = parse_messages(fields["completion"], "completion")
    if problems or others:
        return "; ".join([*problems, *others])
    return _of_turns([*map(_not_learnt, asked), *answered], number, fields, "completion")


def _not_learnt(turn: Turn) -> Turn:
    """A copy of a turn without labels."""
    return Turn(turn.role, turn.content, turn.parts, turn.more, learnt=False)


def _preference(fields: Fields, number: int) -> Row | str:
    """The row of the chosen answer in a pair of preferences; an error text if the fields are malformed.

    If the record has no prompt, the common start of the chosen and the rejected answer becomes the prompt.
    """
    chosen, rejected, prompt = (parsed_json(fields.get(name)) for name in ("chosen", "rejected", "prompt"))
    instruction = fields.get("instruction")
    if isinstance(chosen, Mapping):  # ShareGPT: `chosen` is one turn, which follows `conversations`
        chosen = [chosen]
    if isinstance(chosen, list):
        return _chosen_turns(fields, chosen, rejected, prompt, number)
    if isinstance(instruction, str) and not isinstance(prompt, str):
        return _instruction({**fields, "output": chosen}, number)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        same = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), 0)
        border = max(chosen.rfind(sign, 0, same) for sign in (" ", "\n"))  # no word is cut
        prompt, chosen = chosen[: max(border, 0)], chosen[max(border, 0) :]
    return _text({"prompt": prompt or "", "completion": chosen}, number)


def _chosen_turns(fields: Fields, chosen: list[Any], rejected: object, prompt: object, number: int) -> Row | str:
    """The row of a chosen conversation; turns that the rejected conversation has too have no labels.

    Returns an error text if messages are malformed.

    Args:
        fields: the fields of the record.
        chosen: the messages of the chosen conversation.
        rejected: the messages of the rejected conversation, or another value.
        prompt: the prompt as messages or as text, or another value.
        number: the number of the record in its file.
    """
    turns, problems = parse_messages(chosen, "chosen")
    before: list[Turn] = []
    asked = next((fields[name] for name in _MESSAGES if name in fields), prompt if isinstance(prompt, list) else None)
    if asked is not None and len(turns) < 2:
        before, wrong = parse_messages(asked, "prompt")
        problems += wrong
        if not problems and before[-1] == turns[-1]:
            before = before[:-1]
    elif isinstance(prompt, str) and turns and turns[0].role == "assistant":
        before = [Turn("user", prompt)]
    if problems:
        return "; ".join(problems)
    others, _ = parse_messages(rejected, "rejected") if isinstance(rejected, list) else ([], [])
    same = next((i for i, pair in enumerate(zip(turns, others, strict=False)) if pair[0] != pair[1]), 0)
    return _of_turns([*map(_not_learnt, [*before, *turns[:same]]), *turns[same:]], number, fields, "chosen")


def _instruction(fields: Fields, number: int) -> Row | str:
    """The row of an instruction, with the field names of Alpaca (instruction, input, output) or those of Dolly.

    Returns an error text if a field is malformed.
    """
    output = _as_text(next(fields[name] for name in _OUTPUTS if name in fields))
    given = _as_text(next((fields[name] for name in _INPUTS if name in fields), ""))
    instruction = _as_text(fields["instruction"])
    checked = {"instruction": (instruction, False), "input": (given, True), "output": (output, True)}
    problems = [found for name, (value, empty) in checked.items() if (found := text_problem(name, value, empty=empty))]
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        problems.append(f"field 'history' is {kind_of(history)}, expected pairs of what was asked and answered")
    if problems:
        return "; ".join(problems)
    asked = f"{instruction}\n{given}" if given else instruction
    earlier = [
        Turn(role, str(said)) for pair in history for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    turns = (*_system(fields), *earlier, Turn("user", asked), Turn("assistant", output))
    prompt = (_WITH_INPUT if given else _WITHOUT_INPUT).format(instruction=instruction, input=given)
    return Row(number, prompt, output, turns=turns)


def _multiple_choice(fields: Fields, number: int) -> Row | str:
    """The row of a multiple-choice question; an error text if a field is malformed.

    `number` is the number of the record in its file.
    """
    question, choices = fields["question"], parsed_json(fields["choices"])
    answer = next(fields[name] for name in _ANSWERS if name in fields)
    labels: list[Any] = []
    if isinstance(choices, Mapping):  # ARC and CommonsenseQA: a list of texts and a list of letters
        labels = list(choices.get("label") or [])
        choices = choices.get("text")
    problems = [text_problem("question", question)]
    if not isinstance(choices, list) or len(choices) < 2:
        problems.append(f"field 'choices' is {kind_of(choices)}, expected a list of at least two strings")
        choices = []
    problems += [text_problem(f"choices[{i}]", choice) for i, choice in enumerate(choices)]
    index = _index(answer, labels, len(choices))
    if index is None:
        problems.append(f"field 'answer' is {_shown(answer)}, expected the right choice's index, from 0")
    elif choices and not 0 <= index < len(choices):
        problems.append(f"field 'answer' is {index}, expected 0 to {len(choices) - 1}")
    found = [problem for problem in problems if problem]
    if found or index is None:
        return "; ".join(found)
    completions = tuple(choice_completion(choice) for choice in choices)
    return Row(number, question_prompt(question), completions[index], choices=completions, answer=index)


def _index(answer: object, labels: list[Any], count: int) -> int | None:
    """The index of the right choice, given as its label, its number from 0, or its letter from A.

    None if `answer` is none of these.

    Args:
        answer: the value of the field.
        labels: the label of each choice; empty if the row has no labels.
        count: the number of choices.
    """
    if isinstance(answer, bool):
        return None
    if isinstance(answer, str) and answer.strip() in labels:
        return labels.index(answer.strip())
    if isinstance(answer, int):
        return int(answer)
    if isinstance(answer, str) and not labels:
        word = answer.strip()
        if word.isascii() and word.isdecimal():
            return int(word)
        if len(word) == 1 and "A" <= word <= "Z" and ord(word) - ord("A") < count:
            return ord(word) - ord("A")
    return None


def _shown(answer: object) -> str:
    """The value of an answer for error messages: a text itself, of other values the kind."""
    return f"{answer!r}"[:40] if isinstance(answer, str) else kind_of(answer)
