"""The record of an import, in the base folder: parts that were left out, and names of tensors in the source.

`offsite import` reads it for its report, and `offsite plug-in` to find the tensors in the source. It is never sent to
the other party. Torch-free.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from offsite.errors import StorageError
from offsite.storage.files import write_stream
from offsite.storage.strict_json import strict_json

RECORD = "offsite-import.json"


@dataclass(frozen=True)
class Place:
    """The name of a tensor in the source, and how many of its first matrix rows the base has (None: all)."""

    name: str
    rows: int | None = None


@dataclass(frozen=True)
class ImportRecord:
    """The differences between a base and the checkpoint that it was imported from."""

    notes: tuple[str, ...] = ()  # one sentence each
    left_out: Mapping[str, int] = field(default_factory=dict)  # start of names in the source -> number of tensors
    tower_of: str | None = None  # model type of the multi-modal model that the base is the language model of
    tensors: Mapping[str, Place] = field(default_factory=dict)  # for such a base, its tensor names -> places

    def write(self, folder: Path) -> None:
        """Write the record to a base folder, unless the record is empty."""
        if not (self.notes or self.left_out or self.tower_of):
            return
        content = {
            "notes": list(self.notes),
            "left_out": dict(self.left_out),
            "tower_of": self.tower_of,
            "tensors": {name: [place.name, place.rows] for name, place in self.tensors.items()},
        }
        write_stream(folder / RECORD, [json.dumps(content, indent=1).encode() + b"\n"])


def read_record(folder: Path) -> ImportRecord:
    """The record in a base folder; an empty one if there is none.

    Raises:
        StorageError: the file is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return ImportRecord()
    try:
        content = strict_json(file.read_bytes())
        places = {str(name): Place(str(place), rows) for name, (place, rows) in content["tensors"].items()}
        return ImportRecord(tuple(content["notes"]), content["left_out"], content["tower_of"], places)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{file} is damaged",
            reasons=[f"{type(error).__name__}: {error}"],
            next_step="import the model again with `offsite import MODEL --out base/`",
        ) from None


def count_by_part(names: Iterable[str]) -> dict[str, int]:
    """How many tensors each part of a model has; a part is named by the first words of its tensors' names."""
    parts = Counter(_part(name) for name in names)
    return dict(sorted(parts.items()))


def _part(name: str) -> str:
    words = name.split(".")
    start = words[:2] if words[0] in ("model", "language_model", "thinker", "base_model") else words[:1]
    return ".".join(start)
