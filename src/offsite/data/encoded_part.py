"""Encoded rows as a message between processes: facts in JSON, and all token ids in one array. Nothing is pickled."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offsite.data.conversations.parse_messages import Turn
from offsite.data.examples import Choices, Example
from offsite.data.row import Row

_LARGEST_ID = 2**31


@dataclass
class EncodedPart:
    """The encoded rows of a part of a data set, or of all of it; the fields mean what those of `Encoded` mean."""

    examples: list[Example] = field(default_factory=list)
    long: list[str] = field(default_factory=list)  # a message for each row that is too long
    problems: list[str] = field(default_factory=list)  # a message for each conversation that cannot be encoded
    lengths: list[int] = field(default_factory=list)
    skipped: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: "EncodedPart") -> None:
        """Append the next part of the data set."""
        self.examples += other.examples
        self.long += other.long
        self.problems += other.problems
        self.lengths += other.lengths
        self.skipped += other.skipped
        self.cut += other.cut
        self.dropped.update(other.dropped)
        self.notes.update(other.notes)

    def message(self) -> tuple[dict[str, Any], bytes]:
        """The part as JSON values, and bytes."""
        listed, content = _examples_message(self.examples)
        facts = {"long": self.long, "problems": self.problems, "lengths": self.lengths, "skipped": self.skipped}
        return {**facts, "cut": self.cut, "dropped": self.dropped, "notes": self.notes, "examples": listed}, content

    @classmethod
    def from_message(cls, facts: Mapping[str, Any], content: bytes) -> "EncodedPart":
        """Read a message of `message`; its sender may be hostile.

        Raises:
            ValueError, TypeError, KeyError: it is malformed.
        """
        return cls(
            examples=list(_read_examples(facts["examples"], content)),
            long=_texts(facts["long"]),
            problems=_texts(facts["problems"]),
            lengths=[_count(one) for one in facts["lengths"]],
            skipped=_count(facts["skipped"]),
            cut=_count(facts["cut"]),
            dropped=_counter(facts["dropped"]),
            notes=_counter(facts["notes"]),
        )


def choices_message(found: Sequence[Choices], long: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Multiple-choice rows as JSON values, and bytes."""
    listed, content = _examples_message([example for one in found for example in one.examples])
    rows = [[one.line, len(one.examples), list(one.lengths), one.answer] for one in found]
    return {"long": list(long), "rows": rows, "examples": listed}, content


def read_choices(facts: Mapping[str, Any], content: bytes) -> tuple[list[Choices], list[str]]:
    """Read a message of `choices_message`; raises as `EncodedPart.from_message`."""
    examples = iter(list(_read_examples(facts["examples"], content)))
    found = []
    for line, count, lengths, answer in facts["rows"]:
        own = tuple(example for _, example in zip(range(_count(count)), examples, strict=False))
        if len(own) != count or len(lengths) != count or not 0 <= _count(answer) < count:
            raise ValueError("a row has another number of choices")
        found.append(Choices(_count(line), own, tuple(map(_count, lengths)), answer))
    return found, _texts(facts["long"])


def read_token_id(value: object) -> int:
    """Check a token id that a worker sent.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value < _LARGEST_ID:
        raise ValueError("no token id")
    return value


def row_message(row: Row) -> list[Any]:
    """A row as JSON values."""
    turns = [[turn.role, turn.content, list(turn.parts), dict(turn.more), turn.learnt] for turn in row.turns]
    file = None if row.file is None else str(row.file)
    return [
        row.line, row.prompt, row.completion, list(row.choices), row.answer, turns, dict(row.settings), row.document,
        file,
    ]  # fmt: skip


def read_row(message: Sequence[Any]) -> Row:
    """Read a message of `row_message`, which comes from the process that the user started."""
    line, prompt, completion, choices, answer, turns, settings, document, file = message
    said = tuple(Turn(role, content, tuple(parts), more, learnt) for role, content, parts, more, learnt in turns)
    return Row(
        line, prompt, completion, tuple(choices), answer, said, settings, document, file=Path(file) if file else None
    )


def _examples_message(examples: Sequence[Example]) -> tuple[list[list[Any]], bytes]:
    """Examples as JSON values, and the bytes of all their arrays."""
    arrays: list[npt.NDArray[np.int64]] = []
    listed: list[list[Any]] = []
    for one in examples:
        places = None if one.places is None else len(one.places)
        listed.append(
            [one.line, len(one.ids), one.given, places, one.answers, None if one.file is None else str(one.file)]
        )
        arrays += [one.ids] if one.places is None else [one.ids, one.places]
    return listed, np.concatenate(arrays).astype(np.int64).tobytes() if arrays else b""


def _read_examples(listed: object, content: bytes) -> Iterator[Example]:
    """Read examples of `_examples_message`.

    Raises:
        ValueError, TypeError: they are malformed.
    """
    numbers, at = np.frombuffer(content, dtype=np.int64), 0
    if not isinstance(listed, list) or (len(numbers) and (numbers.min() < 0 or numbers.max() >= _LARGEST_ID)):
        raise ValueError("no token ids")
    for line, length, given, labels, answers, file in listed:
        ids = numbers[at : at + _count(length)].copy()
        at += length
        places = None if labels is None else numbers[at : at + _count(labels)].copy()
        at += labels or 0
        if at > len(numbers) or (places is not None and len(places) and int(places.max()) >= len(ids)):
            raise ValueError("an example has fewer tokens than it says")
        yield Example(
            _count(line),
            ids,
            _count(given),
            places,
            bool(answers),
            file=Path(_text(file)) if file is not None else None,
        )


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError("no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _texts(values: object) -> list[str]:
    if not isinstance(values, list):
        raise TypeError("no list of texts")
    return [_text(one) for one in values]


def _counter(values: object) -> Counter[str]:
    if not isinstance(values, dict):
        raise TypeError("no counts")
    return Counter({_text(name): _count(count) for name, count in values.items()})
