"""A row of a data set as text, before tokenisation, and the settings that say what the data set's fields mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite.data.conversations.parse_messages import Turn, words_of


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set. A plain text or a conversation has no prompt.

    A row with both a prompt and turns is an instruction. It is a conversation if the tokenizer has a chat template, and
    otherwise a prompt with a completion.
    """

    line: int  # from 1: a line of a text file, a row of a table
    prompt: str | None
    completion: str
    choices: tuple[str, ...] = ()  # for a multiple-choice row: all its completions
    answer: int = 0  # index of the right choice
    turns: tuple[Turn, ...] = ()  # for a conversation or an instruction
    settings: Mapping[str, Any] = field(default_factory=dict)  # tools and other arguments for the chat template
    document: bool = False  # whether it is a long text, which is cut into blocks of tokens
    left_out: str = ""  # why the row is not used, although nothing is wrong with it
    file: Path | None = field(default=None, compare=False)  # file of the row

    @property
    def whole_text(self) -> str:
        """All text of the row, for calibration."""
        return words_of(self.turns) if self.turns and self.prompt is None else (self.prompt or "") + self.completion

    def place(self, source: Path | str = "") -> str:
        """The row's file and line, for error messages; `source` is the data set's name, used if the row has no file."""
        return f"{self.file or source}:{self.line}"


@dataclass(frozen=True, slots=True)
class RowForm:
    """Settings for a data set whose field names alone do not say what the fields mean."""

    columns: Mapping[str, str] = field(default_factory=dict)  # the data set's name of a field, by offsite's name of it
    chosen: bool = False  # whether rows of preferences are used, by their chosen answer
