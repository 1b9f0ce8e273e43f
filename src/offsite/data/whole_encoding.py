"""A text -> the tokens of one whole encoding, and which of them stand for a stretch of the text.

A text that is encoded in pieces has other tokens than the model was trained on: tokenizers with prefix marks (Llama 2,
Mistral, Phi 3) start every piece with one, and words are merged over the border. So texts are encoded whole, and the
borders of labels are found by the tokenizer's offsets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from offsite.errors import IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOSE_END = 8  # tokens at a border that may differ when the text before it is encoded alone


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one text, without any that the tokenizer would add at its ends."""

    ids: list[int]
    begins: npt.NDArray[np.int64]  # (T,) character of the text at which each token begins
    ends: npt.NDArray[np.int64]  # (T,) and the one behind its last

    def tokens_of(self, begin: int, end: int) -> range:
        """Positions of the tokens with a character in text[begin:end]; one across a border counts as inside."""
        # a prefix mark before the text has no character of its own
        first = int(np.searchsorted(self.ends, begin, side="right")) if begin else 0
        last = int(np.searchsorted(self.begins, end, side="left"))
        return range(first, max(first, last))


def encode_whole(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", borders: Sequence[Sequence[int]]
) -> Iterator[Encoding]:
    """Encode texts, each as one whole.

    Args:
        texts: to encode, not too many at once: offsets take much more memory than ids.
        tokenizer: of the model.
        borders: for each text, the characters at which a label begins or ends. Where the tokenizer has no offsets,
            only these are known in the encodings.

    Raises:
        IncompatibleError: the tokenizer has no offsets, and encodes the text before a border differently alone.
    """
    if not texts:  # which tokenizers take ill
        return
    if not tokenizer.is_fast:
        for text, places in zip(texts, borders, strict=True):
            yield _without_offsets(text, tokenizer, places)
        return
    found = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for ids, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        yield _with_offsets(list(ids), np.array(offsets, dtype=np.int64).reshape(-1, 2))


def encode_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of a text, without any that the tokenizer would add at its ends."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _with_offsets(ids: list[int], offsets: npt.NDArray[np.int64]) -> Encoding:
    begins, ends = offsets[:, 0], offsets[:, 1]
    # byte-level tokenizers leave spaces out of their offsets: a token that is one space has the place behind it
    begins = np.where(begins == ends, np.maximum(begins - 1, 0), begins)
    return Encoding(ids, np.maximum.accumulate(begins), np.maximum.accumulate(ends))


def _without_offsets(text: str, tokenizer: "PreTrainedTokenizerBase", borders: Sequence[int]) -> Encoding:
    """Borders of a tokenizer without offsets: where the ids of the whole leave those of the text before the border."""
    ids = encode_ids(text, tokenizer)
    places = sorted({0, *borders, len(text)})
    regions = np.zeros(len(ids), dtype=np.int64)  # which stretch between two borders a token is in
    for number, border in enumerate(places[1:-1], start=1):
        before = encode_ids(text[:border], tokenizer)
        same = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        if len(before) - same > _LOOSE_END:
            raise IncompatibleError(
                "labels cannot be placed among this tokenizer's tokens",
                reasons=["it has no offsets (it is a slow one), and encodes the text before a label differently alone"],
                next_step="ask the model's owner for a fast tokenizer: a folder with tokenizer.json",
            )
        regions[same:] = number
    limits = np.array([*places, len(text)], dtype=np.int64)
    return Encoding(ids, limits[regions], limits[regions + 1])
