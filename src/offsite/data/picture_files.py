"""Pictures: where they lie, what they show, and how they become what an encoder is given.

A data set is a folder with a sub-folder for each class, a CSV file of `path` and `label`, or a Parquet file of `image`
and `label`. Pictures are decoded by Pillow and prepared by the model's own processor, so that a picture looks to
tuning, to evaluation and to a pipeline of transformers as one and the same array.
"""

import hashlib
import io
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offsite.data.record_files import read_records
from offsite.data.rows import counted, first
from offsite.data.text_files import kind
from offsite.errors import DataError, IncompatibleError, UsageError
from offsite.extras import require
from offsite.models.library_calls import LIBRARY_ERRORS, quiet
from offsite.models.model_folder import model_settings
from offsite.storage.files import sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image

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
MOST_PIXELS = 50_000_000  # a file of some kilobytes may announce billions
FORMATS = ("PNG", "JPEG", "WEBP")
_TRAINING, _HELD_OUT = "train", ("validation", "val", "valid", "test")  # names of a folder's parts
_CROP_AREA, _CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # of a random crop: share of the picture, width by height

Pixels = npt.NDArray[np.uint8]  # (Y, X, 3)
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: a name for errors, its file or bytes, and its class if it has one."""

    name: str
    source: Path | bytes
    label: str | None


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


def as_file(picture: Picture) -> io.BytesIO | Path:
    """What Pillow opens of a picture."""
    return io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source


def decode(picture: Picture) -> Pixels:
    """A picture as it is to be looked at: turned as its EXIF data say, in RGB (Y, X, 3), transparency dropped.

    Raises:
        DataError: it is broken, too large, or of another format.
    """
    image = require("PIL.Image", "vision", "reading pictures")
    ops = require("PIL.ImageOps", "vision", "reading pictures")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what is too large is refused below
            with image.open(as_file(picture), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise _bad(picture, f"{width} x {height} pixels, at most {MOST_PIXELS:,} are read")
                turned = ops.exif_transpose(opened)
                return np.asarray(_eight_bit(turned).convert("RGB"))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, image.DecompressionBombError) as error:
        raise _bad(picture, f"{type(error).__name__}: {str(error)[:120]}") from None


def _bad(picture: Picture, why: str) -> DataError:
    return DataError(f"{picture.name} is no picture that can be read", reasons=[why])


def _eight_bit(opened: "Image") -> "Image":
    """Grey values of 16 bits, which Pillow would cut off at 255, scaled down."""
    if not opened.mode.startswith("I"):
        return opened
    from PIL import Image

    return Image.fromarray((np.asarray(opened).clip(0, 65535) // 257).astype(np.uint8))


def look(picture: Picture, crop: Sequence[int] | None = None, key: Sequence[int] = ()) -> Pixels:
    """A picture decoded, and with `crop` (height, width) cropped and mirrored by random numbers of which `key` decides.

    Raises:
        DataError: as `decode` does.
    """
    pixels = decode(picture)
    return pixels if crop is None else augmented(pixels, crop, np.random.default_rng(list(key)))


def augmented(
    pixels: Pixels, side: Sequence[int], draw: np.random.Generator, *, area: tuple[float, float] = _CROP_AREA
) -> Pixels:
    """A random crop of a share of the `area`, made `side` (height, width), and mirrored as often as not.

    After arXiv 1409.4842, section 6.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    size = height * width * draw.uniform(*area)
    ratio = np.exp(draw.uniform(*np.log(_CROP_RATIO)))
    crop_width = min(width, max(1, round(float(np.sqrt(size * ratio)))))
    crop_height = min(height, max(1, round(float(np.sqrt(size / ratio)))))
    left, top = int(draw.integers(width - crop_width + 1)), int(draw.integers(height - crop_height + 1))
    crop = Image.fromarray(pixels[top : top + crop_height, left : left + crop_width])
    resized = np.asarray(crop.resize((side[1], side[0]), Image.Resampling.BICUBIC))
    return resized[:, ::-1] if draw.random() < 0.5 else resized


@dataclass(frozen=True)
class Processor:
    """The image processor of a model, on Pillow and NumPy."""

    settings: Any
    side: tuple[int, int]  # height and width of what it makes

    def __call__(self, pixels: Pixels, *, whole: bool = False) -> Floats:
        """Pixels (Y, X, 3) -> (3, height, width), scaled and normalised; `whole` are of the right size already."""
        from PIL import Image

        fitting = {"do_resize": False, "do_center_crop": False} if whole else {}
        made = self.settings(Image.fromarray(np.ascontiguousarray(pixels)), return_tensors="np", **fitting)
        prepared: Floats = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return prepared


def load_processor(folder: Path) -> Processor:
    """The image processor of a model folder; it makes images of one size that the model takes.

    Raises:
        IncompatibleError: there is none, or it makes images that the model cannot take or that have no one size.
        StorageError: a file cannot be read.
    """
    from transformers import AutoImageProcessor

    require("PIL.Image", "vision", "reading pictures")
    settings = model_settings(folder)
    try:
        with quiet():
            loaded = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
            blank = np.zeros((40, 60, 3), dtype=np.uint8)
            shapes = {Processor(loaded, (0, 0))(pixels).shape for pixels in (blank, blank.transpose(1, 0, 2))}
    except LIBRARY_ERRORS as error:
        raise IncompatibleError(
            f"transformers cannot load the image processor of {folder}",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:300]}"],
            next_step="check preprocessor_config.json in that folder",
        ) from error
    problems = [f"wide and high pictures become {sorted(shapes)}"] if len(shapes) != 1 else []
    made = next(iter(shapes))
    problems += _size_problems(settings, made) if not problems else []
    if problems:
        raise IncompatibleError(
            f"the image processor of {folder} does not make what the model takes",
            reasons=problems,
            next_step="mend preprocessor_config.json: one height and width (or a shortest edge, then a crop)",
        )
    return Processor(loaded, (made[1], made[2]))


def _size_problems(settings: Mapping[str, Any], made: Sequence[int]) -> Iterator[str]:
    from offsite.models.architectures import ARCHITECTURES

    family = ARCHITECTURES.get(str(settings.get("model_type")))
    inner = settings.get("vision_config", settings)
    patch, side = inner.get("patch_size"), inner.get("image_size")
    if isinstance(patch, int) and (made[1] % patch or made[2] % patch):
        yield f"it makes {made[1]} x {made[2]} pixels, which patches of {patch} do not fill"
    fits = family is not None and family.vision is not None and family.vision.any_size
    if not fits and isinstance(side, int) and (made[1], made[2]) != (side, side):
        yield f"it makes {made[1]} x {made[2]} pixels, the model has positions for {side} x {side}"
