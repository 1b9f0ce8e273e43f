"""Writes lists of a study's pictures into the data owner's folder, and computes the digest of the pictures."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

from offsite.data.pictures.picture_files import Picture
from offsite.data.pictures.picture_sets import read_pictures
from offsite.errors import StorageError
from offsite.storage.files import replace_file
from offsite.study.recipe import DataTable
from offsite.study.stages import Rows


def list_pictures_for_study(table: DataTable, folder: Path) -> Rows:
    """List the pictures that the study uses in two CSV files of path and class, for training and for testing.

    Pictures that are files stay where they are; pictures that a table holds as bytes are written to files.

    Args:
        table: the data set, from the recipe; if a folder has parts for training and testing, each part is used.
        folder: the folder for the data owner's data.

    Raises:
        DataError: there are no pictures, or rows of a table are wrong.
        StorageError: a picture cannot be read.
    """
    name = table.name.replace("/", "-")
    made, digests = {}, []
    parts = {
        "train": (table.train, table.max_train_rows, "train"),
        "test": (table.test, table.max_test_rows, "held out"),
    }
    for part, (source, most, wanted) in parts.items():
        listed = _spread(read_pictures(source.resolve(), part=wanted, columns=table.columns), most)
        digests.append(_digest(listed))
        made[part] = folder / f"{name}.{part}.{digests[-1][:8]}.csv"
        files = [
            picture.source
            if isinstance(picture.source, Path)
            else _write_picture(made[part].with_suffix("") / f"{number:06}", picture.source)
            for number, picture in enumerate(listed, start=1)
        ]
        _write(made[part], picture_table(files, [picture.label for picture in listed]))
    return Rows(made["train"], made["test"], " ".join(digests), pictures=True)


def picture_table(files: Sequence[Path], labels: Sequence[str | None]) -> bytes:
    """Make the bytes of a CSV file with the paths of pictures, and a column of classes unless all `labels` are None."""
    classes = any(label is not None for label in labels)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label"] if classes else ["path"])
    for file, label in zip(files, labels, strict=True):
        writer.writerow([str(file), label] if classes else [str(file)])
    return text.getvalue().encode()


def _spread(pictures: Sequence[Picture], most: int | None) -> Sequence[Picture]:
    """At most `most` pictures, spread evenly over a list that is sorted by class, so that classes keep their shares.

    None means all pictures.
    """
    count = len(pictures)
    if most is None or most >= count:
        return pictures
    return [pictures[i * count // most] for i in range(most)]


def _bytes_of(picture: Picture) -> bytes:
    """The bytes of a picture's file.

    Raises:
        StorageError: the file cannot be read.
    """
    if isinstance(picture.source, bytes):
        return picture.source
    try:
        return picture.source.read_bytes()
    except OSError as error:
        raise StorageError(
            f"cannot read {picture.name}: {error.strerror or error}",
            next_step="check the file and its disk, then run the same command again",
        ) from None


def _digest(pictures: Sequence[Picture]) -> str:
    """The SHA-256 over the classes and the bytes of the pictures, which does not depend on their paths."""
    digest = hashlib.sha256()
    for picture in pictures:
        label = (picture.label or "").encode()
        digest.update(hashlib.sha256(label).digest() + hashlib.sha256(_bytes_of(picture)).digest())
    return digest.hexdigest()


def _write_picture(file: Path, content: bytes) -> Path:
    """Write a picture's bytes to a file, and return its path."""
    _write(file, content)
    return file


def _write(file: Path, content: bytes) -> None:
    """Write a file, unless it has this content already."""
    if not file.exists() or file.read_bytes() != content:
        replace_file(file, content)
