"""A text -> the tokens of the whole text, and which of these tokens belong to a span of the text.

A text that is encoded in pieces has other tokens than those that the model was trained on: some tokenizers (Llama 2,
Mistral, Phi 3) put a prefix mark before every piece, and characters can merge into one token across a border. So a text
is encoded as a whole, and the tokens at the borders of labels are found by the tokenizer's offsets.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOSE_END = 8  # number of tokens before a border that may differ when the text before it is encoded alone


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one text, without the tokens that the tokenizer would add at its start and end."""

    ids: list[int]
    begins: npt.NDArray[np.int64]  # (T,) character of the text at which each token begins
    ends: npt.NDArray[np.int64]  # (T,) character after the last one of each token

    def tokens_of(self, begin: int, end: int, added: Container[int] = ()) -> range:
        """Positions of the tokens with a character in text[begin:end]; a token across a border counts as inside.

        Args:
            begin: the first character of the span.
            end: the character after the last one of the span.
            added: ids of tokens that are the same in any text (added tokens). Such a token that begins before `begin`
                remains outside, although it may include the spaces after it.
        """
        # a prefix mark before the text has no character of its own
        first = int(np.searchsorted(self.ends, begin, side="right")) if begin else 0
        while first < len(self.ids) and self.begins[first] < begin and self.ids[first] in added:
            first += 1
        last = int(np.searchsorted(self.begins, end, side="left"))
        return range(first, max(first, last))


def encode_whole(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", borders: Sequence[Sequence[int]]
) -> Iterator[Encoding]:
    """Encode several texts, each as one whole; yields one `Encoding` for each.

    Args:
        texts: the texts; not too many at once, since offsets need much more memory than ids.
        tokenizer: the model's tokenizer.
        borders: for each text, the characters at which labels begin or end. For a tokenizer without offsets,
            `Encoding.tokens_of` is exact only at these characters.

    Raises:
        IncompatibleError: the tokenizer has no offsets, and encodes the text before a border differently on its own.
    """
    if not texts:  # tokenizers fail on an empty list
        return
    if not tokenizer.is_fast:
        for text, places in zip(texts, borders, strict=True):
            yield _without_offsets(text, tokenizer, places)
        return
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        yield _with_offsets(list(ids), np.array(offsets, dtype=np.int64).reshape(-1, 2))


def encode_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token ids of a text, without those that the tokenizer would add at its start and end."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _with_offsets(ids: list[int], offsets: npt.NDArray[np.int64]) -> Encoding:
    """The encoding from the ids and the tokenizer's offsets, (T, 2)."""
    begins, ends = offsets[:, 0], offsets[:, 1]
    # byte-level tokenizers leave spaces out of their offsets: the token of one space has an empty span after the space
    begins = np.where(begins == ends, np.maximum(begins - 1, 0), begins)
    return Encoding(ids, np.maximum.accumulate(begins), np.maximum.accumulate(ends))


def _without_offsets(text: str, tokenizer: "PreTrainedTokenizerBase", borders: Sequence[int]) -> Encoding:
    """Encode a text with a tokenizer that has no offsets; exact only at `borders`.

    A border is at the first token where the ids of the whole text differ from the ids of the text before the border.

    Raises:
        IncompatibleError: these ids differ too early, so the border cannot be found.
    """
    ids = encode_ids(text, tokenizer)
    places = sorted({0, *borders, len(text)})
    regions = np.zeros(len(ids), dtype=np.int64)  # for each token the number of the region between two borders
    for number, border in enumerate(places[1:-1], start=1):
        before = encode_ids(text[:border], tokenizer)
        same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        if len(before) - same > _LOOSE_END:
            raise IncompatibleError(
                "labels cannot be placed among this tokenizer's tokens",
                reasons=["it has no offsets (it is a slow one), and encodes the text before a label differently alone"],
                next_step="put a fast tokenizer, one with a tokenizer.json, into the model's folder",
            )
        regions[same:] = number
    limits = np.array([*places, len(text)], dtype=np.int64)
    return Encoding(ids, limits[regions], limits[regions + 1])
