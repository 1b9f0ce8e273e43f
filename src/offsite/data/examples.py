"""Rows of a data set as token ids with labels, as tuning and evaluation use them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offsite.data.data_files import DataPaths, name_of
from offsite.data.read_rows import counted, first
from offsite.errors import IncompatibleError
from offsite.models.model_folder import Source, folder_of, model_settings
from offsite.models.modules.declared import unwrapped


@dataclass(frozen=True, slots=True)
class Example:
    """The token ids of one row of a data set, and which of them have labels.

    All ids after the first `given` have labels; if `places` is set, only the ids at these positions do.
    """

    line: int  # line of the row in its file, or number of the block of a long text; from 1
    ids: npt.NDArray[np.int64]  # (T,)
    given: int  # number of ids before the labels; at least 1, since nothing predicts the first token
    places: npt.NDArray[np.int64] | None = None  # for a conversation: positions in `ids` of its labels, ascending
    answers: bool = True  # False for plain text, True for all other rows
    file: Path | None = None  # file of the row

    @property
    def labelled(self) -> npt.NDArray[np.int64]:
        """The positions in `ids` of the tokens with a label, (L,)."""
        return np.arange(self.given, len(self.ids)) if self.places is None else self.places

    @property
    def labels(self) -> int:
        """The number of tokens with a label."""
        return len(self.ids) - self.given if self.places is None else len(self.places)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples of a data set, with counts of rows that were left out or cut.

    It also counts the turns that lost words in the chat template, and conversations with unusual labels.
    """

    examples: tuple[Example, ...]
    skipped: int  # rows left out: too long, or without a label
    cut: int = 0  # rows that lost tokens
    too_long: int = 0  # rows longer than the limit; they were cut or left out
    lengths: tuple[int, ...] = ()  # number of tokens of every row before any was cut
    dropped: Mapping[str, int] = field(default_factory=dict)  # number of turns that lost words, by kind of words
    notes: Mapping[str, int] = field(default_factory=dict)  # number of conversations with unusual labels, by the reason

    def reports(self) -> list[str]:
        """Sentences for the user: words that the chat template dropped, and conversations with unusual labels."""
        dropped = ", ".join(f"{name} ({count})" for name, count in sorted(self.dropped.items()))
        notes = [f"{name}: {count}" for name, count in sorted(self.notes.items())]
        return [f"left out by the model's chat template: {dropped}", *notes] if dropped else notes


@dataclass(frozen=True, slots=True)
class Choices:
    """A multiple-choice row: one example for each choice, with labels only on the choice."""

    line: int  # line of the row in its file, from 1
    examples: tuple[Example, ...]
    lengths: tuple[int, ...]  # characters of each choice, without the space that joins it to the prompt
    answer: int  # index of the right choice


def require_known(examples: Iterable[Example], model: Source, source: DataPaths) -> None:
    """Refuse rows with token ids for which a model has no embedding, before the model is loaded.

    Args:
        examples: rows of `source`, encoded by the model's tokenizer.
        model: the model's folder, or its verified files.
        source: the data set of the rows, for error messages.

    Raises:
        IncompatibleError: there are such rows; each is listed.
    """

    known = unwrapped(model_settings(model))[0].get("vocab_size")
    if not isinstance(known, int):
        return
    strange = {
        f"{example.file or name_of(source)}:{example.line}": example.ids.max()
        for example in examples
        if example.ids.max() >= known
    }
    if strange:
        problems = [f"{place}: token {token}" for place, token in strange.items()]
        raise IncompatibleError(
            f"the tokenizer in {folder_of(model)} makes tokens that its model does not know:"
            f" {counted(problems, 'row')}",
            reasons=[f"the model knows tokens 0 to {known - 1}", *first(problems)],
            next_step="leave these rows out, or ask the model's owner for a tokenizer that fits the model",
        )
