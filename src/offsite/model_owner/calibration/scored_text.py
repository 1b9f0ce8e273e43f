"""The text that a new emulator is scored on: if possible, text that no step of packing was fitted on.

Without calibration text of the owner's, it is the Python manual that Python itself contains, which no step uses. With
such a text, it is what lies between the sequences that calibration takes from it.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.calibration.calibration_batches import fitted_ranges
from offsite.model_owner.calibration.calibration_text import calibration_length, read_calibration_text, row_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOPICS = ("compound", "objects", "execmodel", "import", "exprlists", "typesseq")  # chapters of the manual
_SHORTEST = 32  # tokens of the shortest passage between two sequences that is used
_ENOUGH = 512  # with fewer tokens between the sequences, all of the text is used


@dataclass(frozen=True)
class ScoredText:
    """The token ids of some passages, whether packing was fitted on them, and what they are called for people."""

    passages: Sequence[Sequence[int]]
    fitted: bool
    name: str


def scored_text(
    model: BaseModel, spec: PackSpec, tokenizer: "PreTrainedTokenizerBase", *, fits: bool, distills: bool
) -> ScoredText:
    """The text on which base and emulator are scored.

    Args:
        model: the opened base, a language model.
        spec: the settings of packing.
        tokenizer: the base's tokenizer.
        fits: whether packing runs the network on calibration text at all.
        distills: whether it also distills on it.

    Raises:
        DataError: the calibration text cannot be read.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    file = spec.calibration.source
    if file is None and (chapters := _manual()):
        return ScoredText([ids_of(text) for text in chapters], fitted=False, name="the Python manual")
    ids, name = ids_of(read_calibration_text(file, row_form(spec))), str(file or "the text in the package")
    if not fits:
        return ScoredText([ids], fitted=False, name=name)
    amounts = (spec.calibration.tokens, *([spec.distill.tokens] if distills else []))
    begin = 0 if tokenizer.bos_token_id is None else 1
    taken = fitted_ranges(len(ids), calibration_length(model.config), begin, amounts)
    between = [ids[start:end] for start, end in _between(len(ids), taken) if end - start >= _SHORTEST]
    if sum(map(len, between)) >= _ENOUGH:
        return ScoredText(between, fitted=False, name=f"{name}, between the sequences that packing was fitted on")
    return ScoredText([ids], fitted=True, name=name)


def _manual() -> list[str]:
    """Chapters of the manual that Python contains; empty if this Python was installed without it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [topics[name] for name in _TOPICS if name in topics]


def _between(length: int, taken: Sequence[range]) -> list[tuple[int, int]]:
    """The parts of a text of `length` tokens, as start and end, that are in none of the ranges."""
    found, at = [], 0
    for one in sorted(taken, key=lambda each: each.start):
        found.append((at, max(at, one.start)))
        at = max(at, one.stop)
    return [*found, (at, length)]
