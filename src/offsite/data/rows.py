"""Records -> rows: what the fields of a data set mean. docs/data.md shows an example of every kind.

{"text"}                            a text, labelled throughout
{"prompt", "completion"}            labels on the completion
{"messages": [{"role", "content"}]} a conversation, labels on what the assistant says
{"question", "choices", "answer"}   multiple choice; tuned on the right choice, scored on all of them
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.data.row_files import KINDS, kind, read_records, read_text
from offsite.errors import DataError

ROLES = ("system", "user", "assistant")
_LISTED = 20  # bad rows that an error lists
_FIELDS = ({"text"}, {"prompt", "completion"}, {"messages"}, {"question", "choices", "answer"})
_NAMES = frozenset().union(*_FIELDS)
_EXPECTED = "expected 'text', or 'prompt' and 'completion', or 'messages', or 'question', 'choices' and 'answer'"
_EXAMPLE = '{"prompt": "...", "completion": "..."} or {"text": "..."}; docs/data.md has the others'


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says."""

    role: str  # one of ROLES
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was written; a text and a conversation have no prompt."""

    line: int  # from 1: a line of a text file, a row of a table
    prompt: str | None
    completion: str
    choices: tuple[str, ...] = ()  # the completions to choose from
    answer: int = 0  # which of them is right
    turns: tuple[Turn, ...] = ()
    document: bool = False  # a long text, to be cut into blocks

    @property
    def whole_text(self) -> str:
        """All of its text, as calibration reads it."""
        return "\n".join(turn.content for turn in self.turns) or (self.prompt or "") + self.completion


def question_prompt(question: str) -> str:
    """The prompt of a multiple-choice question, in tuning and in evaluation."""
    return f"Question: {question}\nAnswer:"


def choice_completion(choice: str) -> str:
    """What completes that prompt."""
    return f" {choice}"


def read_rows(path: Path) -> list[Row]:
    """Read a data set: JSONL, .csv, .parquet, .txt, or a folder that Hugging Face datasets saved to disk.

    Raises:
        DataError: unreadable, without a row, or with bad rows, each listed by file, line and field.
        UsageError: the format needs a package that is not installed.
    """
    if kind(path) == ".txt":
        return [Row(1, None, read_text(path), document=True)]
    return _rows_of(read_records(path, _NAMES), path)


def _rows_of(records: Iterable[tuple[int, Mapping[str, Any] | str]], path: Path) -> list[Row]:
    rows, problems = [], []
    for number, record in records:
        row = record if isinstance(record, str) else parse_row(record, number)
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems.append((number, row))
    if problems:
        raise DataError(
            f"{counted(problems, 'bad row')} in {path}",
            reasons=_told(path, problems, every=not rows),
            next_step=f"mend these lines; a row is {_EXAMPLE}",
        )
    if not rows:
        raise DataError(f"the data set {path} is empty", next_step=f"write {KINDS} with rows such as {_EXAMPLE}")
    return rows


def _told(path: Path, problems: Sequence[tuple[int, str]], *, every: bool) -> list[str]:
    """Problems with the rows that have them; what is wrong with every row of a file is told once."""
    number, what = problems[0]
    if every and len(problems) > 1 and all(other == what for _, other in problems):
        return [f"{path}:{number}: {what}", f"and the same of {len(problems) - 1} more"]
    return first([f"{path}:{number}: {what}" for number, what in problems])


def parse_row(fields: Mapping[str, Any], number: int) -> Row | str:
    """The row, or everything that is wrong with it; fields that no kind of row has are left alone."""
    known = {name: value for name, value in fields.items() if name in _NAMES}
    if set(known) not in _FIELDS:
        found = ", ".join(repr(name)[:40] for name in sorted(fields, key=str)[:6]) or "none"
        return f"fields {found}; {_EXPECTED}"
    fields = known
    if "messages" in fields:
        return _conversation(fields["messages"], number)
    if "choices" in fields:
        return _multiple_choice(fields, number)
    problems = [problem for name, value in fields.items() if (problem := _text_problem(name, value))]
    if problems:
        return "; ".join(problems)
    return Row(number, fields.get("prompt"), fields["text"] if "text" in fields else fields["completion"])


def _conversation(messages: object, number: int) -> Row | str:
    if not isinstance(messages, list) or not messages:
        return f"field 'messages' is {_kind(messages)}, expected a list of {{'role', 'content'}}"
    problems = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            found = ", ".join(map(repr, message)) if isinstance(message, dict) else _kind(message)
            problems.append(f"field '{where}' has {found[:80] or 'nothing'}, expected 'role' and 'content'")
            continue
        if message["role"] not in ROLES:
            problems.append(f"field '{where}.role' is {str(message['role'])[:40]!r}, expected {', '.join(ROLES)}")
        if problem := _text_problem(f"{where}.content", message["content"]):
            problems.append(problem)
    if not problems and all(message["role"] != "assistant" for message in messages):
        problems.append("field 'messages' has no assistant turn, so nothing to learn")
    if problems:
        return "; ".join(problems)
    return Row(number, None, "", turns=tuple(Turn(message["role"], message["content"]) for message in messages))


def _multiple_choice(fields: Mapping[str, Any], number: int) -> Row | str:
    question, choices, answer = fields["question"], fields["choices"], fields["answer"]
    problems = [_text_problem("question", question)]
    if not isinstance(choices, list) or len(choices) < 2:
        problems.append(f"field 'choices' is {_kind(choices)}, expected a list of at least two strings")
        choices = []
    problems += [_text_problem(f"choices[{i}]", choice) for i, choice in enumerate(choices)]
    if type(answer) is not int:
        problems.append(f"field 'answer' is {_kind(answer)}, expected the right choice's index, from 0")
    elif choices and not 0 <= answer < len(choices):
        problems.append(f"field 'answer' is {answer}, expected 0 to {len(choices) - 1}")
    found = [problem for problem in problems if problem]
    if found:
        return "; ".join(found)
    completions = tuple(choice_completion(choice) for choice in choices)
    return Row(number, question_prompt(question), completions[answer], choices=completions, answer=answer)


def _text_problem(name: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"field {name!r} is {_kind(value)}, expected a string"
    if not value and name != "prompt":
        return f"field {name!r} is empty"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return f"field {name!r} holds half of a surrogate pair, which is no text"
    return None


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return type(value).__name__


def counted(items: Sequence[object], word: str) -> str:
    """A count with its word: 1 row, 2 rows."""
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def first(lines: Sequence[str]) -> list[str]:
    """The first lines of a long list of problems, and how many more there are."""
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
