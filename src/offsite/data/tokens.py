"""Rows -> token ids. Tuning, evaluation and generation all use this one tokenisation.

A row with a prompt becomes BOS + prompt and completion (encoded as one text) + EOS; the loss is on the completion and
EOS. For a plain text the loss is on the whole text and EOS. A conversation is rendered by the tokenizer's chat
template, with the loss on the assistant's answers. A long text is cut into blocks.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from offsite.data.confined_tokenizer import ConfinedTokenizer, characters, confined_tokenizer
from offsite.data.conversations.chat_template import ChatTemplate, ConversationError, require_template
from offsite.data.conversations.label_answers import Conversation, read_conversation
from offsite.data.data_files import DataPaths, name_of
from offsite.data.encoded_part import EncodedPart
from offsite.data.examples import Choices, Encoded, Example
from offsite.data.read_rows import counted, first
from offsite.data.row import Row
from offsite.data.whole_encoding import Encoding, encode_ids, encode_whole
from offsite.errors import DataError
from offsite.models.model_folder import Source
from offsite.models.tokenizers import load_tokenizer
from offsite.protocol.manifest import MANIFEST
from offsite.storage.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer: TypeAlias = PreTrainedTokenizerBase | ConfinedTokenizer

LongRows = Literal["error", "truncate", "skip"]

_TOGETHER = 512  # number of rows that are encoded at once
_CHARACTERS = 2**22  # number of characters that are encoded at once, unless one row has more
_CUT = 'cut rows with --long-rows truncate (long_rows = "truncate" in table [tune] or [eval] of a --config file)'


@contextmanager
def open_tokenizer(source: Source) -> Iterator["Tokenizer"]:
    """Context manager: the tokenizer of a model; that of a signed folder runs in a process of its own.

    Raises:
        UsageError, IncompatibleError: as for `offsite.models.tokenizers.load_tokenizer`.
    """
    if isinstance(source, Snapshot) or (source / MANIFEST).exists():
        with confined_tokenizer(source) as confined:
            yield confined
    else:
        yield load_tokenizer(source)


def encode(
    rows: Sequence[Row],
    tokenizer: "Tokenizer",
    *,
    source: DataPaths,
    max_length: int,
    long_rows: LongRows = "error",
) -> Encoded:
    """Tokenise the rows of a data set for tuning and evaluation.

    Prompt and completion are encoded together as one text; a token across their border has a label. The tokenizer does
    not add special tokens: BOS (if the tokenizer has one) and EOS are added here, unless the row's text contains them.

    Args:
        rows: rows from `read_rows`.
        tokenizer: the model's tokenizer, or its handle if it runs in a process of its own.
        source: the data set of the rows, for error messages.
        max_length: the largest number of tokens of an example, with BOS and EOS; also the length of a long text's
            blocks.
        long_rows: whether longer rows are an error, are cut (a prompt loses its start, then a completion its end; a
            conversation loses its end), or are left out.

    Raises:
        DataError: there are long rows and `long_rows` is "error" (all are listed), conversations cannot be labelled, or
            no row is left.
        IncompatibleError: the tokenizer does not show which token a label begins with.
    """
    name = name_of(source)
    used = [row for row in rows if not row.left_out]
    answered = [row for row in used if row.prompt is None or row.completion]  # public data sets have empty outputs
    whole = EncodedPart(skipped=len(rows) - len(answered))
    whole.notes.update(row.left_out for row in rows if row.left_out)
    encode_rows = tokenizer.encode_part if isinstance(tokenizer, ConfinedTokenizer) else RowEncoder(tokenizer).encode
    for part in _parts(answered):
        whole.add(encode_rows(part, name, max_length, skip_long=long_rows == "skip"))
    if whole.problems:
        raise _refused(whole.problems, name)
    if long_rows == "error":
        _require_short(whole.long, name)
    if not whole.examples:
        raise DataError(
            f"no row of {name} is left",
            reasons=[
                f"{len(rows)} rows read, {len(whole.long)} over {max_length} tokens left out",
                *_counts(whole.notes),
            ],
            next_step=f"raise --max-length, or {_CUT}"
            if whole.long
            else "write rows with an answer; docs/data.md shows them",
        )
    long, examples = len(whole.long), tuple(whole.examples)
    return Encoded(examples, whole.skipped, whole.cut, long, tuple(whole.lengths), whole.dropped, whole.notes)


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield the rows in parts that are encoded at once: of a number of rows, and of characters if there are several."""
    part: list[Row] = []
    size = 0
    for row in rows:
        long = characters(row)
        if part and (len(part) == _TOGETHER or size + long > _CHARACTERS):
            yield part
            part, size = [], 0
        part.append(row)
        size += long
    if part:
        yield part


class RowEncoder:
    """Encodes parts of a data set with one tokenizer, in this process."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None  # made with the first rows

    def encode(self, rows: Sequence[Row], name: str, max_length: int, *, skip_long: bool) -> EncodedPart:
        """Encode some rows of a data set.

        Args:
            rows: the rows, which have labels.
            name: the data set's name, for messages.
            max_length: as for `encode`.
            skip_long: whether longer rows are left out; else they are cut.

        Raises:
            DataError: a row is a conversation, and the tokenizer has no chat template.
            IncompatibleError: the tokenizer does not show which token a label begins with.
        """
        part, bos = EncodedPart(), self._tokenizer.bos_token_id
        self._template = self._template or ChatTemplate(self._tokenizer)
        for draft in _drafts(rows, self._tokenizer, self._template, name, max_length, part.problems):
            if conversation := draft.conversation:
                part.dropped.update(conversation.dropped)
                part.notes.update(conversation.notes)
            over = draft.length > max_length
            part.lengths.append(draft.length)
            if over:
                part.long.append(f"{draft.row.place(name)}: {draft.length} tokens, at most {max_length}")
            example = (draft.cut(max_length, bos=bos) if over else draft).example()
            if example.labels and not (over and skip_long):
                part.examples.append(example)
                part.cut += over
            else:
                part.skipped += 1  # also for a row of a single token, which nothing predicts
        return part


def encode_choices(
    rows: Sequence[Row],
    tokenizer: "Tokenizer",
    *,
    source: DataPaths,
    max_length: int,
    long_rows: LongRows = "error",
) -> list[Choices]:
    """Tokenise the multiple-choice rows among `rows`: for each choice BOS, prompt and choice, without EOS.

    Arguments as for `encode`.

    Raises:
        DataError: a choice is too long and `long_rows` is "error"; all such rows are listed.
    """
    name = name_of(source)
    asked = [row for row in rows if row.choices and not row.left_out]
    found: list[Choices] = []
    long: list[str] = []
    for part in _parts(asked):
        if isinstance(tokenizer, ConfinedTokenizer):
            more, over = tokenizer.choices_part(part, name, max_length, skip_long=long_rows == "skip")
        else:
            more, over = choices_part(part, tokenizer, name, max_length, skip_long=long_rows == "skip")
        found += more
        long += over
    if long_rows == "error":
        _require_short(long, name)
    return found


def choices_part(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", name: str, max_length: int, *, skip_long: bool
) -> tuple[list[Choices], list[str]]:
    """Encode some multiple-choice rows in this process; returns them, and a message for each row that is too long.

    Arguments as for `RowEncoder.encode`.
    """
    found, long = [], []
    for row in rows:
        drafts = _choice_drafts(row, tokenizer)
        longest = max(draft.length for draft in drafts)
        if longest > max_length:
            long.append(f"{row.place(name)}: {longest} tokens with its longest choice, at most {max_length}")
            if skip_long:
                continue
            drafts = [draft.cut(max_length, bos=tokenizer.bos_token_id) for draft in drafts]
        lengths = tuple(len(choice) - 1 for choice in row.choices)
        found.append(Choices(row.line, tuple(draft.example() for draft in drafts), lengths, row.answer))
    return found, long


def _counts(notes: Mapping[str, int]) -> list[str]:
    """A text "name: count" for each entry, sorted by name."""
    return [f"{name}: {count}" for name, count in sorted(notes.items())]


def _require_short(long: Sequence[str], source: str) -> None:
    """Refuse a data set with rows that are too long; `long` has one text for each.

    Raises:
        DataError: there are such rows.
    """
    if long:
        raise DataError(
            f"{counted(long, 'row')} of {source} over the longest length",
            reasons=first(long),
            next_step=f'{_CUT}; "skip" leaves them out, and --max-length may be raised, up to the model\'s context',
        )


def encode_prompt(row: Row, tokenizer: "Tokenizer") -> list[int]:
    """The token ids that a model reads before it answers a row: those before the first label in `encode`."""
    if isinstance(tokenizer, ConfinedTokenizer):
        return tokenizer.prompt_ids(row)
    problems: list[str] = []
    drafts = list(_drafts([row], tokenizer, ChatTemplate(tokenizer), "", 1, problems))
    if problems:
        raise _refused(problems, "the prompts")
    (draft,) = drafts
    return draft.start if draft.places is None else draft.answer[: draft.places[0]]


@dataclass(frozen=True, slots=True)
class _Draft:
    """The tokens of one row before they are cut to the longest length."""

    row: Row
    line: int
    start: list[int]  # ids before the labels; empty for a conversation
    answer: list[int]  # ids with labels; for a conversation all ids
    places: list[int] | None = None  # for a conversation: positions of its labels in `answer`
    conversation: Conversation | None = None

    @property
    def length(self) -> int:
        """The number of tokens of the draft."""
        return len(self.start) + len(self.answer)

    def cut(self, most: int, *, bos: int | None) -> "_Draft":
        """A copy with at most `most` tokens.

        A prompt loses its start, then a completion its end; a conversation loses its end. `bos` is the id of the BOS
        token, which remains at the start; None if the tokenizer has none.
        """
        if self.places is not None:
            kept = [place for place in self.places if place < most]
            return replace(self, answer=self.answer[:most], places=kept)
        lead = self.start[:1] if self.start and self.start[0] == bos else []
        room = max(most - len(self.answer) - len(lead), 0)
        body = self.start[len(lead) :]
        start = lead + (body[-room:] if room else [])
        return replace(self, start=start, answer=self.answer[: most - len(start)])

    def example(self) -> Example:
        """The draft as an `Example`."""
        ids = np.array(self.start + self.answer, dtype=np.int64)
        if self.places is not None:
            return Example(self.line, ids, 1, np.array(self.places, dtype=np.int64), file=self.row.file)
        return Example(self.line, ids, max(1, len(self.start)), answers=self.row.prompt is not None, file=self.row.file)


def _drafts(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    source: str,
    max_length: int,
    problems: list[str],
) -> Iterator[_Draft]:
    """Yields a draft (tokens that are not cut yet) for every row, in order; for a long text several drafts.

    Args:
        rows: the rows.
        tokenizer: the model's tokenizer.
        template: its chat template.
        source: the data set's name, for errors.
        max_length: the most tokens of a long text's blocks.
        problems: gets a message for each conversation that cannot be rendered or labelled.

    Raises:
        DataError: a row is a conversation, and the tokenizer has no chat template.
    """
    if not tokenizer.chat_template and any(row.turns and row.prompt is None for row in rows):
        require_template(tokenizer)
    written: list[tuple[Row, Conversation]] = []
    for row in rows:
        try:
            written.append((row, _as_text(row, template)))
        except ConversationError as error:
            problems.append(f"{row.place(source)}: field 'messages': {error}")
    yield from _encoded(written, tokenizer, max_length)


def _refused(problems: Sequence[str], source: str) -> DataError:
    """The error for conversations that the chat template refuses; `problems` has one text for each."""
    system = any("system" in problem.casefold() for problem in problems)
    hint = "put the system's words at the start of the first user turn, " if system else ""
    return DataError(
        f"{counted(problems, 'conversation')} of {source} cannot be used with this model's chat template",
        reasons=first(problems),
        next_step=f'correct these rows: {hint}leave turns out, or write {{"prompt", "completion"}}',
    )


def _as_text(row: Row, template: ChatTemplate) -> Conversation:
    """The text of a row and the spans that have labels; no spans for a long text, which is cut into blocks later."""
    if row.document:
        return Conversation("", ())
    if row.turns and (row.prompt is None or template.tokenizer.chat_template):
        return read_conversation(row.turns, template, row.settings)
    prompt = row.prompt or ""
    return Conversation(prompt + row.completion, ((len(prompt), len(prompt) + len(row.completion)),))


def _encoded(
    written: Sequence[tuple[Row, Conversation]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[_Draft]:
    """Yields a draft (tokens that are not cut yet) for every row, from rows that are already rendered as texts."""
    texts = [said.text for _, said in written]
    borders = [[place for span in said.labelled for place in span] for _, said in written]
    added = frozenset(tokenizer.added_tokens_decoder)
    for (row, said), encoding in zip(written, encode_whole(texts, tokenizer, borders), strict=True):
        if row.document:
            yield from _blocks(row, encode_ids(row.completion, tokenizer), tokenizer, max_length)
        elif row.turns and (row.prompt is None or tokenizer.chat_template):
            yield _conversation_draft(row, said, encoding, added, tokenizer.eos_token_id)
        else:
            at = encoding.tokens_of(*said.labelled[0], added).start
            yield _Draft(row, row.line, *_with_ends(encoding.ids[:at], encoding.ids[at:], tokenizer))


def _conversation_draft(row: Row, said: Conversation, encoding: Encoding, added: Container[int], eos: int) -> _Draft:
    """The tokens of `apply_chat_template`, plus EOS if the template writes no end-of-turn token.

    Args:
        row: the row of the conversation.
        said: its rendered text and the spans that have labels.
        encoding: the tokens of that text.
        added: ids of the tokenizer's added tokens.
        eos: id of the EOS token.
    """
    places = sorted({place for span in said.labelled for place in encoding.tokens_of(*span, added)})
    ids = encoding.ids
    if said.lacks_end:
        ids, places = [*ids, eos], [*places, len(ids)]
    return _Draft(row, row.line, [], ids, [place for place in places if place > 0], said)  # nothing predicts the first


def _choice_drafts(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[_Draft]:
    """The tokens of a question for each choice: the prompt and the choice, without EOS."""
    prompt = row.prompt or ""
    texts = [prompt + choice for choice in row.choices]
    drafts = []
    for encoding in encode_whole(texts, tokenizer, [[len(prompt), len(text)] for text in texts]):
        at = encoding.tokens_of(len(prompt), len(prompt) + 1).start
        start = _with_ends(encoding.ids[:at], [], tokenizer)[0]
        drafts.append(_Draft(row, row.line, start, encoding.ids[at:]))
    return drafts


def _blocks(row: Row, text: list[int], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Iterator[_Draft]:
    """Yields the blocks of a long text whose token ids are `text`; a block has at most `max_length` tokens.

    Every token (and EOS) is a label in exactly one block, except a first token that nothing can predict. A block starts
    with BOS. If the tokenizer has no BOS, a block starts with the last token of the previous block, which has no label
    there.
    """
    bos = tokenizer.bos_token_id
    ids = text[1:] if text[:1] == [bos] else text
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    body = max_length - 1
    before, ids = ([bos], ids) if bos is not None else (ids[:1], ids[1:])
    for number, at in enumerate(range(0, len(ids), body), start=1):
        yield _Draft(row, number, before, ids[at : at + body])
        before = [bos] if bos is not None else ids[at + body - 1 : at + body]


def _with_ends(
    prompt: list[int], completion: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Add BOS before a prompt (if the tokenizer has BOS) and EOS after a completion, unless they are there already."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = prompt if bos is None or [*prompt, *completion][:1] == [bos] else [bos, *prompt]
    answer = completion if completion and completion[-1] == eos else [*completion, eos]
    return start, answer
