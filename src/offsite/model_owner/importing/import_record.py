"""The record of an import, a JSON file in the base folder: the parts of the source that were left out.

For the language model of a multi-modal checkpoint it also has the name of each tensor in the source. `offsite import`
reads it for its report, and `offsite plug-in --whole` to find the tensors. The data owner never gets it. Torch-free.
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
    """Where a tensor of the base is in the source: its name there, and how many of its first rows the base has."""

    name: str
    rows: int | None = None  # None if the base has all rows


@dataclass(frozen=True)
class ImportRecord:
    """The differences between a base and the checkpoint that it was imported from."""

    notes: tuple[str, ...] = ()  # for the user, such as which part of the source was imported
    left_out: Mapping[str, int] = field(default_factory=dict)  # start of names in the source -> number of tensors
    tower_of: str | None = None  # model type of the multi-modal model that the base is the language model of
    tensors: Mapping[str, Place] = field(default_factory=dict)  # only for such a base: by tensor name in the base

    def write(self, folder: Path) -> None:
        """Write the record as a JSON file into a base folder; an empty record is not written."""
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
    """Read the record of the import in a base folder; without a file, an empty record.

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
    """The number of tensors in each part of a model; a part is the start of tensor names, such as "vision_model"."""
    parts = Counter(_part(name) for name in names)
    return dict(sorted(parts.items()))


def _part(name: str) -> str:
    """The first word of a tensor's name; the first two if the first is only a prefix, such as "model"."""
    words = name.split(".")
    start = words[:2] if words[0] in ("model", "language_model", "thinker", "base_model") else words[:1]
    return ".".join(start)
