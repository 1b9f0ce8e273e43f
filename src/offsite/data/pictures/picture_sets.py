"""Data sets of pictures: lists each picture with its class. No picture is opened here.

A data set is a folder with one sub-folder for each class, or a table with a picture (or its path) and a label in each
row: one file, or a folder of shards as on Hugging Face Hub. Names of parts (splits) and classes are compared in one
Unicode form, since an accented letter can be one or two characters.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite.data.data_files import DataPaths, Part, files_of, name_of, part_role, parts_of, paths_of
from offsite.data.file_formats import RECORDS, read_records
from offsite.data.parquet_and_arrow import ClassNumber, class_names, features_of
from offsite.data.pictures.picture_files import Picture
from offsite.data.read_rows import counted, first
from offsite.data.text_files import kind
from offsite.errors import DataError, UsageError
from offsite.storage.files import sha256_of
from offsite.storage.unicode_names import existing

KINDS = "a folder with a sub-folder for each class, a .csv or .jsonl of path and label, or .parquet of image and label"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# Picture formats that are not supported. Such files are listed too, so that they are reported as unreadable; otherwise
# they would be missing from the training without notice.
_OTHER_SUFFIXES = frozenset(
    {
        ".avif",
        ".bmp",
        ".dcm",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jxl",
        ".svg",
        ".tga",
        ".tif",
        ".tiff",
    }
)
_METADATA = (
    "metadata.csv",
    "metadata.jsonl",
    "metadata.parquet",
)  # files with the labels of a folder's pictures, as in Hugging Face datasets
_PLACES = ("image", "path", "file_name")  # columns that hold a picture or its path


def read_pictures(
    data: DataPaths, *, labelled: bool = True, part: str = "", columns: Mapping[str, str] | None = None
) -> list[Picture]:
    """List the pictures of data sets, without opening any.

    Args:
        data: folders or files; their pictures are joined.
        labelled: whether every picture needs a class. If False, a folder is searched to any depth.
        part: "train" or "held out" reads this part of a folder that has both; "" reads the folder as it is.
        columns: the table's names for its columns `image` (or `path`) and `label`; None: these columns are found by
            their names or types.

    Raises:
        DataError: a data set does not exist or is empty, or rows are bad; each bad row is listed.
    """
    found: list[Picture] = []
    for path in map(existing, paths_of(data)):
        if path.is_dir():
            found += _in_folder(path, labelled, part, columns or {})
        elif kind(path) in RECORDS:
            found += _in_tables([path], labelled, columns or {})
        else:
            raise DataError(f"{path} is not a data set of pictures", next_step=f"name {KINDS}")
    if not found:
        raise DataError(
            f"the data set {name_of(data)} holds no picture", next_step=f"name {KINDS}; pictures are PNG, JPEG, WebP"
        )
    return found


def held_out_part(path: Path) -> bool:
    """Whether a data set is a folder that has both a training part and a held-out part."""
    path = existing(path)
    if not path.is_dir():
        return False
    if folders := _parts(path):
        return folders["train"] != folders["held out"]
    roles = {part_role(name) for name in parts_of(path)} if not _holds_pictures(path) else set()
    return "train" in roles and bool(roles & {"validation", "test"})


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the training part and the held-out part, under the names "train" and "held out".

    Empty if the folder is not divided like this. If there is only one part, it is under both names. A class may
    have the same name as a part.
    """
    folders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    roles: dict[str, Path] = {}
    for entry in folders:
        if unicodedata.normalize("NFC", entry.name).isalpha() and (role := part_role(entry.name)):
            roles.setdefault(role, entry)
    held_out = roles.get("validation", roles.get("test"))
    if held_out is not None and "train" in roles:
        return {"train": roles["train"], "held out": held_out}
    if len(folders) == 1 and any(entry.is_dir() for entry in folders[0].iterdir()):
        if roles:  # there is only one part, and its sub-folders are the classes
            return dict.fromkeys(("train", "held out"), folders[0])
        return _parts(folders[0])  # unpacked archives have one outer folder
    return {}


def _in_folder(folder: Path, labelled: bool, part: str, columns: Mapping[str, str]) -> list[Picture]:
    """List the pictures of one part of a folder; arguments as for `read_pictures`.

    Raises:
        DataError: pictures have no class, or rows of a table are bad.
    """
    place = _parts(folder).get(part, folder)
    if not _holds_pictures(place):
        wanted: Part = "held out" if part == "held out" else "train"
        return _in_tables(files_of(place, wanted), labelled, columns) if parts_of(place) else []
    if labelled and (listed := next((place / name for name in _METADATA if (place / name).is_file()), None)):
        return _in_tables([listed], labelled, columns)
    files = sorted(_picture_files(place))
    if labelled and (loose := [file for file in files if file.parent == place]):
        raise DataError(
            f"{counted(loose, 'picture')} of {place} in no class",
            reasons=first([file.name for file in loose]),
            next_step="put each into a sub-folder with the name of its class",
        )
    return [
        Picture(str(file), file, _composed(file.relative_to(place).parts[0]) if labelled else None) for file in files
    ]


def _composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which a letter and its accent are one character."""
    return unicodedata.normalize("NFC", name)


def _picture_files(folder: Path) -> Iterator[Path]:
    """Yields the picture files in a folder at any depth, without hidden ones."""
    found = (file for file in folder.rglob("*") if kind(file) in SUFFIXES | _OTHER_SUFFIXES and file.is_file())
    return (file for file in found if not _hidden(file.relative_to(folder)))


def _holds_pictures(folder: Path) -> bool:
    """Whether a folder contains picture files at any depth."""
    return next(_picture_files(folder), None) is not None


def _hidden(place: Path) -> bool:
    """Whether a path is inside a hidden folder or a system's folder, such as notebook checkpoints or `__MACOSX`."""
    return any(name.startswith((".", "__MACOSX")) for name in place.parts)


def _in_tables(files: Sequence[Path], labelled: bool, columns: Mapping[str, str]) -> list[Picture]:
    """List the pictures of tables with a row for each picture; arguments as for `read_pictures`.

    Raises:
        DataError: rows are bad; each is listed.
    """
    found, problems = [], []
    for file in files:
        table = _find_columns(file, columns, labelled)
        for record in read_records(file, (*table.places, table.label)):
            row = record.fields if isinstance(record.fields, str) else _row(table, record.number, record.fields)
            if isinstance(row, str):
                problems.append(f"{file}:{record.number}: {row}")
            else:
                found.append(row)
    if problems:
        raise DataError(
            f"{counted(problems, 'bad row')} in {', '.join(str(file) for file in files[:3])}",
            reasons=first(problems),
            next_step="name the columns, such as --columns image=img,label=fine_label; " + f"a data set is {KINDS}",
        )
    return found


@dataclass(frozen=True, slots=True)
class _Table:
    """A file with a table of pictures, and the names of its columns."""

    file: Path
    places: tuple[str, ...]  # columns that may hold the picture or its path
    label: str  # column of the class; empty if pictures need no class
    classes: int  # number of classes that the table stores names for


def _find_columns(file: Path, columns: Mapping[str, str], labelled: bool) -> _Table:
    """Find the columns of a table by their names, or by the types that the table stores for its columns.

    Args:
        file: the table.
        columns: the table's names for columns, by our names ("image", "path", "label"); may be empty.
        labelled: whether a column with the class is needed.
    """
    features = features_of(file) if kind(file) in (".parquet", ".arrow") else {}
    places = tuple(columns[name] for name in _PLACES if name in columns)
    if not places:
        images = [name for name, feature in features.items() if _type_of(feature) == "Image"]
        places = tuple(images) if len(images) == 1 and not set(_PLACES) & features.keys() else _PLACES
    label = columns.get("label", "label")
    if "label" not in columns and "label" not in features:
        labels = [name for name, feature in features.items() if _type_of(feature) == "ClassLabel"]
        label = labels[0] if len(labels) == 1 else label
    return _Table(file, places, label if labelled else "", len(class_names(features.get(label))))


def _type_of(feature: object) -> object:
    """The name of a column's type as Hugging Face datasets stores it; None if the column has none."""
    return feature.get("_type") if isinstance(feature, Mapping) else None


def _row(table: _Table, number: int, fields: Mapping[str, Any]) -> Picture | str:
    """The picture of record `number` of a table, whose values are `fields`; an error text if the row is bad."""
    place: object = next((fields[name] for name in table.places if fields.get(name) is not None), None)
    name = f"{table.file}:{number}"
    content: object = None
    if isinstance(place, dict):  # as Hugging Face datasets stores pictures
        content, place = place.get("bytes"), place.get("path")
    elif isinstance(place, bytes):
        place, content = None, place
    label = None
    if table.label:
        said = fields.get(table.label)
        if not (isinstance(said, str | int) and str(said).strip()):
            return f"field {table.label!r} is {str(said)[:40]!r}, expected the name or number of a class"
        if table.classes and not isinstance(said, str | ClassNumber):
            return f"field {table.label!r} is {said}, expected a class from 0 to {table.classes - 1}"
        label = _composed(said.name if isinstance(said, ClassNumber) else str(said))
    if isinstance(content, bytes):
        return Picture(name, content, label)
    if not isinstance(place, str) or not place:
        return "no field 'path' with the name of a file, or 'image' with a picture's bytes"
    return Picture(f"{name} {place}", existing(table.file.parent / place), label)


def split_by_seed(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Split pictures into training pictures and held-out pictures, with the same held-out share of each class.

    The split depends only on the arguments.

    Args:
        pictures: the pictures to split.
        share: the share that is held out, 0 to 1.
        seed: the seed of the random choice.

    Raises:
        UsageError: the share is so small that no picture of any class is held out.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(pictures)).tolist()
    by_class: dict[str | None, list[int]] = {}
    for index in order:
        by_class.setdefault(pictures[index].label, []).append(index)
    held_out = {index for members in by_class.values() for index in members[: round(share * len(members))]}
    if not held_out:
        largest = max(len(members) for members in by_class.values())
        raise UsageError(
            f"eval_share = {share} holds out no picture",
            reasons=[f"the largest class has {counted(range(largest), 'picture')}"],
            next_step="raise eval_share, leave it out, or name held-out pictures with --eval-data",
        )
    return (
        [picture for index, picture in enumerate(pictures) if index not in held_out],
        [picture for index, picture in enumerate(pictures) if index in held_out],
    )


def pictures_digest(pictures: Iterable[Picture]) -> str:
    """SHA-256 over the classes and contents of pictures, in order; it does not depend on where the files are."""
    digest = hashlib.sha256()
    for picture in pictures:
        try:
            content = (
                sha256_of(picture.source)
                if isinstance(picture.source, Path)
                else hashlib.sha256(picture.source).hexdigest()
            )
        except (OSError, ValueError):  # ValueError: the path cannot be a file's name
            content = "unreadable"  # with skip_bad such a picture is left out later
        digest.update(f"{picture.label!r} {content}\n".encode())
    return digest.hexdigest()
