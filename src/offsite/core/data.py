"""Rows -> token ids -> batches: the one tokenisation that tuning, evaluation and generation share.

A row is one JSON object a line, {"text": ...} or {"prompt": ..., "completion": ...}. An example is
BOS + prompt + completion + EOS; the loss is on the completion and EOS (on all of a text and EOS). Batches hold rows of
similar length, padded at the right; padding is known by length, never by id, since many models pad with their EOS.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from offsite.core.checkpoint import strict_json
from offsite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LISTED = 20  # bad rows that an error lists
_SORTED_STEPS = 32  # steps whose rows are sorted by length together
_FIELDS = ({"text"}, {"prompt", "completion"})


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was written; a text has no prompt."""

    line: int  # from 1
    prompt: str | None
    completion: str


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row; the first `given` of them carry no label."""

    line: int
    ids: npt.NDArray[np.int64]  # (T,)
    given: int  # at least 1: nothing predicts the first token

    @property
    def labels(self) -> int:
        """Labelled tokens."""
        return len(self.ids) - self.given


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples of a data set, and how many rows were left out for their length."""

    examples: tuple[Example, ...]
    skipped: int


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL file; blank lines are passed over.

    Raises:
        DataError: unreadable, without a row, or with bad rows, each listed by file, line and field.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(
            f"cannot read the data set {path}: {error.strerror}", next_step="check the path; it is a JSONL file"
        ) from None
    rows, problems = [], []
    for number, raw in enumerate(content.splitlines(), start=1):
        if not raw.strip():
            continue
        row = _parse_row(raw, number)
        if isinstance(row, Row):
            rows.append(row)
        else:
            problems.append(f"{path}:{number}: {row}")
    if problems:
        raise DataError(
            f"{_count(problems, 'bad row')} in {path}",
            reasons=_first(problems),
            next_step='mend these lines; a row is {"prompt": "...", "completion": "..."} or {"text": "..."}',
        )
    if not rows:
        raise DataError(
            f"the data set {path} is empty",
            next_step='write one JSON object a line: {"prompt": "...", "completion": "..."} or {"text": "..."}',
        )
    return rows


def _parse_row(raw: bytes, number: int) -> Row | str:
    """The row, or what is wrong with it."""
    try:
        fields = strict_json(raw)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}"
    except ValueError as error:
        return f"not JSON: {error}"
    if not isinstance(fields, dict):
        return f"a {type(fields).__name__}, expected an object"
    if set(fields) not in _FIELDS:
        found = ", ".join(repr(name)[:40] for name in sorted(fields)[:6]) or "none"
        return f"fields {found}; expected 'text', or 'prompt' and 'completion'"
    for name, value in fields.items():
        problem = _field_problem(name, value)
        if problem:
            return f"field {name!r} {problem}"
    return Row(number, fields.get("prompt"), fields["text"] if "text" in fields else fields["completion"])


def _field_problem(name: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"is {type(value).__name__}, expected a string"
    if not value and name != "prompt":
        return "is empty"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return "holds half of a surrogate pair, which is no text"
    return None


def encode(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source: Path,
    max_length: int,
    long_rows: Literal["error", "truncate", "skip"] = "error",
) -> Encoded:
    """Tokenise rows as tuning, evaluation and generation all see them.

    Prompt and completion are encoded apart and their ids joined: a generating model is given the prompt's ids alone,
    so it must have been tuned on exactly those, and not on a token that straddles the border. The tokenizer adds
    nothing by itself; BOS (where it has one) and EOS are put here, unless the row's own text brings them.

    Args:
        rows: from `read_rows`.
        tokenizer: of the model.
        source: the file that the rows are from, for errors.
        max_length: longest example in tokens, BOS and EOS included.
        long_rows: longer ones are an error, cut (a prompt loses its start, then a completion its end), or left out.

    Raises:
        DataError: long rows under "error", all listed; or no row is left.
    """
    prompts = _tokenise(tokenizer, [row.prompt or "" for row in rows])
    completions = _tokenise(tokenizer, [row.completion for row in rows])
    examples, long = [], []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        start, answer = _with_ends(prompt, completion, tokenizer)
        length = len(start) + len(answer)
        if length > max_length:
            long.append(f"{source}:{row.line}: {length} tokens, at most {max_length}")
            if long_rows == "skip":
                continue
            start, answer = _cut(start, answer, max_length, bos=tokenizer.bos_token_id)
        ids = np.array(start + answer, dtype=np.int64)
        if len(ids) > 1:  # a single token has nothing to predict it
            examples.append(Example(row.line, ids, max(1, len(start))))
    if long and long_rows == "error":
        raise DataError(
            f"{_count(long, 'row')} of {source} over the longest length",
            reasons=_first(long),
            next_step="cut them with --long-rows truncate, leave them out with --long-rows skip, "
            "or raise --max-length up to the model's context",
        )
    if not examples:
        raise DataError(
            f"no row of {source} is left",
            reasons=[f"{len(rows)} rows read, {len(long)} over {max_length} tokens left out"],
            next_step="raise --max-length, or cut rows with --long-rows truncate",
        )
    return Encoded(tuple(examples), len(rows) - len(examples))


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that a model is given before it answers: those that `encode` puts before the completion."""
    return _with_ends(_tokenise(tokenizer, [prompt])[0], [], tokenizer)[0]


def _tokenise(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _with_ends(
    prompt: list[int], completion: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = prompt if bos is None or [*prompt, *completion][:1] == [bos] else [bos, *prompt]
    answer = completion if completion and completion[-1] == eos else [*completion, eos]
    return start, answer


def _cut(start: list[int], answer: list[int], most: int, *, bos: int | None) -> tuple[list[int], list[int]]:
    lead = start[:1] if start and start[0] == bos else []
    room = max(most - len(answer) - len(lead), 0)
    body = start[len(lead) :]
    start = lead + (body[-room:] if room else [])
    return start, answer[: most - len(start)]


def step_batches(examples: Sequence[Example], *, rows: int, seed: int, epoch: int) -> list[list[int]]:
    """The rows of every step of one epoch, a function of the arguments alone, so a resumed run finds its place.

    Rows are shuffled; within runs of 32 steps they are sorted by length and cut into steps, whose order is shuffled
    again: little padding, and over an epoch no trend in length.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(examples))
    batches: list[list[int]] = []
    for begin in range(0, len(order), rows * _SORTED_STEPS):
        together = sorted(order[begin : begin + rows * _SORTED_STEPS].tolist(), key=lambda i: len(examples[i].ids))
        batches += [together[at : at + rows] for at in range(0, len(together), rows)]
    return [batches[i] for i in generator.permutation(len(batches))]


def micro_batches(examples: Sequence[Example], rows: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut rows into groups of at most `budget` padded tokens (a longer row goes alone), similar lengths together."""
    group: list[int] = []
    for row in sorted(rows, key=lambda i: (len(examples[i].ids), i)):
        if group and len(examples[row].ids) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs and where the labels are; the last token of a row is never an input, only a label."""

    ids: npt.NDArray[np.int64]  # (B, T), padded at the right with 0
    mask: npt.NDArray[np.int64]  # (B, T), 1 where a token is
    places: npt.NDArray[np.int64]  # (L,) flat positions in B*T whose outputs predict a label
    targets: npt.NDArray[np.int64]  # (L,) the labels
    owners: npt.NDArray[np.int64]  # (L,) row in the batch of each label


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples to one rectangle and list their labelled positions."""
    width = max(len(example.ids) for example in examples) - 1
    ids = np.zeros((len(examples), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    places, targets, owners = [], [], []
    for i, example in enumerate(examples):
        length = len(example.ids) - 1
        ids[i, :length] = example.ids[:-1]
        mask[i, :length] = 1
        places.append(i * width + np.arange(example.given - 1, length))  # the token before predicts
        targets.append(example.ids[example.given :])
        owners.append(np.full(example.labels, i))
    return Batch(ids, mask, np.concatenate(places), np.concatenate(targets), np.concatenate(owners))


def _count(items: Sequence[str], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
