"""Describes a data set without training: counts, lengths, and three rows or pictures as the model reads them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from offsite.data.data_files import DataPaths, Part, name_of
from offsite.data.examples import Example, require_known
from offsite.data.pictures.picture_files import decode
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.data.tokens import LongRows, encode, encode_choices
from offsite.models.model_folder import Source

if TYPE_CHECKING:
    from offsite.data.tokens import Tokenizer

T = TypeVar("T")

_SHOWN = 3  # number of rows or pictures that are shown


@dataclass(frozen=True)
class ShownRow:
    """One row of the data set as the model reads it: its text in pieces, each with or without labels."""

    place: str  # file and line
    tokens: int
    learnt: int  # tokens with a label
    pieces: tuple[tuple[str, bool], ...]  # each piece of text, and whether it has labels


@dataclass(frozen=True)
class TextCheck:
    """The description of a text data set after tokenisation with a model's tokenizer."""

    data: str
    rows: int  # rows that were read
    used: int  # examples that a run would use; a long text becomes several
    left_out: int  # rows that are too long, or without a label
    cut: int  # rows that lose tokens
    too_long: int  # rows longer than `max_length`
    max_length: int  # in tokens
    tokens: int
    learnt_tokens: int  # tokens with a label
    lengths: Mapping[str, int]  # shortest, median, longest ... row in tokens, before any is cut
    questions: int  # multiple-choice rows
    dropped: Mapping[str, int]  # number of turns that lost words in the chat template, by kind of words
    notes: Mapping[str, int]  # number of conversations with unusual labels, by the reason
    refused: bool  # whether a run would refuse this data set because rows are too long
    shown: tuple[ShownRow, ...]


@dataclass(frozen=True)
class ShownPicture:
    """The name, class and size of one picture of the data set."""

    name: str
    label: str
    height: int
    width: int


@dataclass(frozen=True)
class PictureCheck:
    """The description of a data set of pictures, all of which were decoded."""

    data: str
    pictures: int
    left_out: int  # pictures that cannot be read
    classes: Mapping[str, int]  # number of pictures of each class
    shown: tuple[ShownPicture, ...]
    refused: bool = False


def check_text(
    data: DataPaths,
    tokenizer: "Tokenizer",
    model: Source,
    *,
    form: RowForm,
    part: Part,
    max_length: int,
    long_rows: LongRows,
) -> TextCheck:
    """Read and encode a text data set as a run does, and describe it.

    Args:
        data: the data sets; the rows of several are joined.
        tokenizer: the model's tokenizer.
        model: the model's folder, or its verified files.
        form: the settings that say what the fields of the data set mean.
        part: for a data set with several parts, whether to read the training part or the held-out part.
        max_length: the largest number of tokens of a row.
        long_rows: what a run does with longer rows. Under "error" they are left out here, and `refused` is set.

    Raises:
        DataError: rows are bad, or no row is left.
        IncompatibleError: the tokenizer does not fit the model.
    """
    rows = read_rows(data, form, part)
    lenient: LongRows = "skip" if long_rows == "error" else long_rows
    encoded = encode(rows, tokenizer, source=data, max_length=max_length, long_rows=lenient)
    questions = encode_choices(rows, tokenizer, source=data, max_length=max_length, long_rows=lenient)
    require_known(encoded.examples, model, data)
    examples, lengths = encoded.examples, np.array(encoded.lengths)
    return TextCheck(
        data=name_of(data),
        rows=len(rows),
        used=len(examples),
        left_out=encoded.skipped,
        cut=encoded.cut,
        too_long=encoded.too_long,
        max_length=max_length,
        tokens=sum(len(example.ids) for example in examples),
        learnt_tokens=sum(example.labels for example in examples),
        lengths={
            "shortest": int(lengths.min()),
            "median": int(np.median(lengths)),
            "95 % are at most": int(np.percentile(lengths, 95, method="higher")),
            "longest": int(lengths.max()),
        },
        questions=len(questions),
        dropped=dict(encoded.dropped),
        notes=dict(encoded.notes),
        refused=long_rows == "error" and encoded.too_long > 0,
        shown=tuple(_shown(example, tokenizer, name_of(data)) for example in _some(examples)),
    )


def check_pictures(data: DataPaths, pictures: Pictures) -> PictureCheck:
    """Describe decoded pictures: their number, their classes and three of them."""
    shown = []
    for picture in _some(pictures.pictures):
        height, width, _ = decode(picture).shape
        shown.append(ShownPicture(picture.name, picture.label or "", height, width))
    counts = Counter(picture.label or "" for picture in pictures.pictures)
    return PictureCheck(name_of(data), len(pictures), len(pictures.skipped), dict(sorted(counts.items())), tuple(shown))


def _some(items: Sequence[T]) -> list[T]:
    """The first, the middle and the last item of a list; all items if there are at most three."""
    places = sorted({0, len(items) // 2, len(items) - 1}) if len(items) > _SHOWN else range(len(items))
    return [items[place] for place in places]


def _shown(example: Example, tokenizer: "Tokenizer", source: str) -> ShownRow:
    """The example as text, cut into pieces where labels begin and end.

    `source` is the name of its data set, used if the example has no file.
    """
    learnt = np.zeros(len(example.ids), dtype=bool)
    learnt[example.labelled] = True
    borders = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(learnt)]
    texts = [_text(example.ids[:border].tolist(), tokenizer) for border in borders]
    pieces = []
    for (begin, end), (before, until) in zip(pairwise(borders), pairwise(texts), strict=True):
        # cut from the text up to here, since tokens that are decoded alone may lose the space before them
        text = until[len(before) :] if until.startswith(before) else _text(example.ids[begin:end].tolist(), tokenizer)
        pieces.append((text, bool(learnt[begin])))
    return ShownRow(f"{example.file or source}:{example.line}", len(example.ids), example.labels, tuple(pieces))


def _text(ids: list[int], tokenizer: "Tokenizer") -> str:
    """The text of token ids, with special tokens and without any clean-up."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
