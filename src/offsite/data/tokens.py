"""Rows -> token ids: the one tokenisation that tuning, evaluation and generation share.

An example of a prompt row is BOS + prompt + completion + EOS; the loss is on the completion and EOS (on all of a text
and EOS). A conversation is what the tokenizer's chat template makes of it, with the loss on what the assistant says. A
long text is cut into blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from offsite.data.chat import ConversationError, conversation_ids, require_template
from offsite.data.rows import Row, counted, first
from offsite.errors import DataError, IncompatibleError
from offsite.models.model_folder import model_settings
from offsite.models.modules.declared import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongRows = Literal["error", "truncate", "skip"]

_CUT = 'cut rows with long_rows = "truncate" in table [tune] or [eval] of a --config file'


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row; labels are on all of them after the first `given`, or on those at `places` alone."""

    line: int
    ids: npt.NDArray[np.int64]  # (T,)
    given: int  # at least 1: nothing predicts the first token
    places: npt.NDArray[np.int64] | None = None  # positions in `ids` of a conversation's labels, ascending

    @property
    def labelled(self) -> npt.NDArray[np.int64]:
        """Positions in `ids` that carry a label, (L,)."""
        return np.arange(self.given, len(self.ids)) if self.places is None else self.places

    @property
    def labels(self) -> int:
        """Labelled tokens."""
        return len(self.ids) - self.given if self.places is None else len(self.places)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples of a data set, and how many rows were left out for their length."""

    examples: tuple[Example, ...]
    skipped: int


@dataclass(frozen=True, slots=True)
class Choices:
    """A multiple-choice row: one example for each choice, labelled on the choice alone."""

    line: int
    examples: tuple[Example, ...]
    lengths: tuple[int, ...]  # characters of each choice, without the space that joins it to the prompt
    answer: int


def encode(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source: Path,
    max_length: int,
    long_rows: LongRows = "error",
) -> Encoded:
    """Tokenise rows as tuning, evaluation and generation all see them.

    Prompt and completion are encoded apart and their ids joined: a generating model is given the prompt's ids alone,
    so it must have been tuned on exactly those, and not on a token that straddles the border. The tokenizer adds
    nothing by itself; BOS (where it has one) and EOS are put here, unless the row's own text brings them.

    Args:
        rows: from `read_rows`.
        tokenizer: of the model.
        source: the file that the rows are from, for errors.
        max_length: longest example in tokens, BOS and EOS included; also the length of a long text's blocks.
        long_rows: longer ones are an error, cut (a prompt loses its start, then a completion its end; a conversation
            its end), or left out.

    Raises:
        DataError: long rows under "error", all listed; conversations that the template cannot split; or no row is left.
    """
    examples, long, skipped = [], [], 0
    for draft in _drafts(rows, tokenizer, source, max_length):
        if draft.length > max_length:
            long.append(f"{source}:{draft.line}: {draft.length} tokens, at most {max_length}")
        cut = draft.cut(max_length, bos=tokenizer.bos_token_id) if draft.length > max_length else draft
        example = cut.example()
        if example.labels and not (draft.length > max_length and long_rows == "skip"):
            examples.append(example)
        else:
            skipped += 1  # also a single token, which has nothing to predict it
    if long_rows == "error":
        _require_short(long, source)
    if not examples:
        raise DataError(
            f"no row of {source} is left",
            reasons=[f"{len(rows)} rows read, {len(long)} over {max_length} tokens left out"],
            next_step=f"raise max_length, or {_CUT}",
        )
    return Encoded(tuple(examples), skipped)


def encode_choices(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source: Path,
    max_length: int,
    long_rows: LongRows = "error",
) -> list[Choices]:
    """Tokenise the multiple-choice rows among `rows`: BOS, prompt and a choice, for each choice; no EOS.

    Raises:
        DataError: a choice is too long under "error", all listed.
    """
    found, long = [], []
    for row in rows:
        if not row.choices:
            continue
        prompt, *choices = _tokenise(tokenizer, [row.prompt or "", *row.choices])
        start = _with_ends(prompt, [], tokenizer)[0]
        drafts = [_Draft(row.line, start, choice) for choice in choices]
        longest = max(draft.length for draft in drafts)
        if longest > max_length:
            long.append(f"{source}:{row.line}: {longest} tokens with its longest choice, at most {max_length}")
            if long_rows == "skip":
                continue
            drafts = [draft.cut(max_length, bos=tokenizer.bos_token_id) for draft in drafts]
        lengths = tuple(len(choice) - 1 for choice in row.choices)
        found.append(Choices(row.line, tuple(draft.example() for draft in drafts), lengths, row.answer))
    if long_rows == "error":
        _require_short(long, source)
    return found


def require_known(examples: Iterable[Example], folder: Path, source: Path) -> None:
    """Refuse rows with tokens that a model has no embedding of, before it is loaded.

    Args:
        examples: rows of `source`, by the tokenizer in `folder`.
        folder: the model's.
        source: the file that the rows are from, for errors.

    Raises:
        IncompatibleError: there are some, each row listed.
    """

    known = unwrapped(model_settings(folder))[0].get("vocab_size")
    if not isinstance(known, int):
        return
    strange = {example.line: example.ids.max() for example in examples if example.ids.max() >= known}
    if strange:
        problems = [f"{source}:{line}: token {token}" for line, token in strange.items()]
        raise IncompatibleError(
            f"the tokenizer in {folder} makes tokens that its model does not know: {counted(problems, 'row')}",
            reasons=[f"the model knows tokens 0 to {known - 1}", *first(problems)],
            next_step="leave these rows out, or ask the model's owner for a tokenizer that fits the model",
        )


def _require_short(long: Sequence[str], source: Path) -> None:
    if long:
        raise DataError(
            f"{counted(long, 'row')} of {source} over the longest length",
            reasons=first(long),
            next_step=f'{_CUT}; "skip" leaves them out, and max_length may be raised there, up to the model\'s context',
        )


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that a model is given before it answers: those that `encode` puts before the completion."""
    return _with_ends(_tokenise(tokenizer, [prompt])[0], [], tokenizer)[0]


@dataclass(frozen=True, slots=True)
class _Draft:
    """An example that may still be too long."""

    line: int
    start: list[int]
    answer: list[int]  # of a conversation everything
    places: list[int] | None = None

    @property
    def length(self) -> int:
        return len(self.start) + len(self.answer)

    def cut(self, most: int, *, bos: int | None) -> "_Draft":
        if self.places is not None:
            return _Draft(self.line, [], self.answer[:most], [place for place in self.places if place < most])
        lead = self.start[:1] if self.start and self.start[0] == bos else []
        room = max(most - len(self.answer) - len(lead), 0)
        body = self.start[len(lead) :]
        start = lead + (body[-room:] if room else [])
        return _Draft(self.line, start, self.answer[: most - len(start)])

    def example(self) -> Example:
        ids = np.array(self.start + self.answer, dtype=np.int64)
        if self.places is not None:
            return Example(self.line, ids, 1, np.array(self.places, dtype=np.int64))
        return Example(self.line, ids, max(1, len(self.start)))


def _drafts(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", source: Path, max_length: int
) -> Iterator[_Draft]:
    if any(row.turns for row in rows):
        require_template(tokenizer)
    prompts = _tokenise(tokenizer, [row.prompt or "" for row in rows])
    completions = _tokenise(tokenizer, [row.completion for row in rows])
    problems = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        if row.document:
            yield from _blocks(completion, tokenizer, max_length)
        elif row.turns:
            try:
                yield _Draft(row.line, [], *conversation_ids(row.turns, tokenizer))
            except ConversationError as error:
                problems.append(f"{source}:{row.line}: field 'messages': {error}")
        else:
            yield _Draft(row.line, *_with_ends(prompt, completion, tokenizer))
    if problems:
        raise DataError(
            f"{counted(problems, 'conversation')} of {source} cannot be labelled exactly",
            reasons=first(problems),
            next_step='mend these rows, write them as {"prompt", "completion"}, or have the model\'s owner put '
            "{% generation %} marks into the chat template",
        )


def _blocks(text: list[int], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Iterator[_Draft]:
    """Every token of a text (and EOS) once under a label, but for the first where nothing can predict it.

    A block starts with a BOS, or where the tokenizer has none with the last token of the block before, unlabelled.
    """
    bos = tokenizer.bos_token_id
    ids = text[1:] if text[:1] == [bos] else text
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    body = max_length - 1
    before, ids = ([bos], ids) if bos is not None else (ids[:1], ids[1:])
    for number, at in enumerate(range(0, len(ids), body), start=1):
        yield _Draft(number, before, ids[at : at + body])
        before = [bos] if bos is not None else ids[at + body - 1 : at + body]


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
