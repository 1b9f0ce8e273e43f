"""Sets of pictures: where they lie and what they show; none is opened here.

A data set is a folder with a sub-folder for each class, a CSV file of `path` and `label`, or a Parquet file of `image`
and `label`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offsite.data.picture_files import Picture
from offsite.data.record_files import read_records
from offsite.data.rows import counted, first
from offsite.data.text_files import kind
from offsite.errors import DataError, UsageError
from offsite.storage.files import sha256_of

KINDS = "a folder with a sub-folder for each class, a .csv of path and label, or a .parquet of image and label"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# Pictures all the same: passed over in silence they would be missing from the training, so they are told as unreadable.
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
_TRAINING, _HELD_OUT = "train", ("validation", "val", "valid", "test")  # names of a folder's parts


def read_pictures(path: Path, *, labelled: bool = True, part: str = "") -> list[Picture]:
    """List the pictures of a data set; none is opened.

    Args:
        path: folder or file.
        labelled: whether every picture needs a class; without it a folder is searched to any depth.
        part: "train" or "held out" takes that part of a folder that has both; "" takes the folder as it is.

    Raises:
        DataError: there is no such data set, it is empty, or rows are bad, each listed.
    """
    if path.is_dir():
        found = _in_folder(_part(path, part), labelled)
    elif kind(path) in (".csv", ".parquet"):
        found = _in_table(path, labelled)
    else:
        raise DataError(f"{path} is no data set of pictures", next_step=f"name {KINDS}")
    if not found:
        raise DataError(
            f"the data set {path} holds no picture", next_step=f"name {KINDS}; pictures are PNG, JPEG, WebP"
        )
    return found


def held_out_part(path: Path) -> bool:
    """Whether a data set is a folder that names its training and its held-out pictures."""
    return _part(path, "held out") != path


def _part(path: Path, part: str) -> Path:
    """The part of a folder that has both; a class may have the name of one."""
    held_out = next((path / name for name in _HELD_OUT if (path / name).is_dir()), None)
    if held_out is None or not (path / _TRAINING).is_dir():
        return path
    return {"train": path / _TRAINING, "held out": held_out}.get(part, path)


def _in_folder(folder: Path, labelled: bool) -> list[Picture]:
    found = (file for file in folder.rglob("*") if kind(file) in SUFFIXES | _OTHER_SUFFIXES and file.is_file())
    files = sorted(file for file in found if not _hidden(file.relative_to(folder)))
    if labelled and (loose := [file for file in files if file.parent == folder]):
        raise DataError(
            f"{counted(loose, 'picture')} of {folder} in no class",
            reasons=first([file.name for file in loose]),
            next_step="put each into a sub-folder with the name of its class",
        )
    return [Picture(str(file), file, file.relative_to(folder).parts[0] if labelled else None) for file in files]


def _hidden(place: Path) -> bool:
    """Whether it lies where systems and tools keep what is theirs, such as copies of a notebook's files."""
    return any(name.startswith(".") for name in place.parts)


def _in_table(path: Path, labelled: bool) -> list[Picture]:
    found, problems = [], []
    for record in read_records(path, ("path", "image", "label")):
        number, fields = record.number, record.fields
        row = fields if isinstance(fields, str) else _row(path, number, fields, labelled)
        if isinstance(row, str):
            problems.append(f"{path}:{number}: {row}")
        else:
            found.append(row)
    if problems:
        raise DataError(f"{counted(problems, 'bad row')} in {path}", reasons=first(problems), next_step=f"name {KINDS}")
    return found


def _row(path: Path, number: int, fields: Mapping[str, Any], labelled: bool) -> Picture | str:
    place, label = fields.get("path", fields.get("image")), fields.get("label")
    name = f"{path}:{number}"
    content: object = None
    if isinstance(place, dict):  # as Hugging Face datasets stores pictures
        content, place = place.get("bytes"), place.get("path")
    elif isinstance(place, bytes):
        place, content = None, place
    if labelled and not (isinstance(label, str | int) and str(label).strip()):
        return f"field 'label' is {str(label)[:40]!r}, expected the name or number of a class"
    if isinstance(content, bytes):
        return Picture(name, content, str(label) if labelled else None)
    if not isinstance(place, str) or not place:
        return "no field 'path' with the name of a file, or 'image' with a picture's bytes"
    return Picture(f"{name} {place}", path.parent / place, str(label) if labelled else None)


def split_by_seed(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out pictures: of each class the same share is held out, a function of the arguments alone.

    Raises:
        UsageError: the share is less than a picture of any class.
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
    """SHA-256 over classes and contents of pictures in their order, wherever they lie."""
    digest = hashlib.sha256()
    for picture in pictures:
        try:
            content = (
                sha256_of(picture.source)
                if isinstance(picture.source, Path)
                else hashlib.sha256(picture.source).hexdigest()
            )
        except (OSError, ValueError):  # the latter of a name that can be none
            content = "unreadable"  # and left out by those who may
        digest.update(f"{picture.label!r} {content}\n".encode())
    return digest.hexdigest()
