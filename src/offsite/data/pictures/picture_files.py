"""Picture files -> the arrays that an encoder reads.

Pillow decodes pictures, and the model's own image processor prepares them. So tuning, evaluation and a transformers
pipeline all see the same array for a picture.
"""

import io
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offsite.errors import DataError, IncompatibleError
from offsite.extras import require
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, quiet
from offsite.models.model_folder import Source, as_folder, folder_of, model_settings

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 50_000_000  # limit of memory: a small file may declare billions of pixels
FORMATS = ("PNG", "JPEG", "WEBP")
_CROP_AREA, _CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)  # ranges of a random crop: share of the area, width / height

Pixels = npt.NDArray[np.uint8]  # (Y, X, 3)
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a data set, not decoded: its name for error messages, its file or bytes, and its class."""

    name: str
    source: Path | bytes
    label: str | None  # its class; None if it has none


def as_file(picture: Picture) -> io.BytesIO | Path:
    """The picture as a file that Pillow can open: its path, or its bytes as a stream."""
    return io.BytesIO(picture.source) if isinstance(picture.source, bytes) else picture.source


def decode(picture: Picture) -> Pixels:
    """Decode a picture: its pixels, (Y, X, 3), RGB, rotated as its EXIF data say, without transparency.

    Raises:
        DataError: the picture is broken or too large, or its format is not supported.
    """
    image = require("PIL.Image", "vision", "reading pictures")
    ops = require("PIL.ImageOps", "vision", "reading pictures")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; too large pictures are refused below
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
    """The error for a picture that cannot be used; `why` is the reason."""
    return DataError(f"{picture.name} is not a readable picture", reasons=[why])


def _eight_bit(opened: "Image") -> "Image":
    """A 16-bit grey picture scaled to 8 bits, since Pillow would clip it at 255; other pictures unchanged."""
    if not opened.mode.startswith("I"):
        return opened
    from PIL import Image

    return Image.fromarray((np.asarray(opened).clip(0, 65535) // 257).astype(np.uint8))


def look(picture: Picture, crop: Sequence[int] | None = None, key: Sequence[int] = ()) -> Pixels:
    """Decode a picture; if `crop` is given, also crop and mirror it at random.

    Args:
        picture: the picture.
        crop: height and width of the result; None: the whole picture in its own size, not mirrored.
        key: integers that seed the random crop and mirroring; unused without `crop`.

    Raises:
        DataError: the picture is broken or too large, or its format is not supported.
    """
    pixels = decode(picture)
    return pixels if crop is None else augmented(pixels, crop, np.random.default_rng(list(key)))


def augmented(
    pixels: Pixels, side: Sequence[int], draw: np.random.Generator, *, area: tuple[float, float] = _CROP_AREA
) -> Pixels:
    """A random crop of a picture, resized to `side` (height, width) and mirrored with probability 0.5.

    Source: arXiv 1409.4842, section 6.

    Args:
        pixels: the picture, (Y, X, 3).
        side: height and width of the result.
        draw: the random generator.
        area: the range from which the crop's share of the picture's area is drawn.
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
    """The image processor of a model; it runs on Pillow and NumPy."""

    settings: Any
    side: tuple[int, int]  # height and width of its output

    def __call__(self, pixels: Pixels, *, whole: bool = False) -> Floats:
        """Scale and normalise pixels: (Y, X, 3) -> (3, height, width).

        With `whole`, the pixels already have the right size, and are only normalised.
        """
        from PIL import Image

        fitting = {"do_resize": False, "do_center_crop": False} if whole else {}
        made = self.settings(Image.fromarray(np.ascontiguousarray(pixels)), return_tensors="np", **fitting)
        prepared: Floats = np.asarray(made["pixel_values"][0], dtype=np.float32)
        return prepared


def load_processor(source: Source) -> Processor:
    """Load the image processor of a model, and check that all its outputs have one size, which the model accepts.

    Raises:
        IncompatibleError: there is no image processor, or its outputs have no fixed size or one that the model refuses.
        StorageError: a file cannot be read.
    """
    from transformers import AutoImageProcessor

    require("PIL.Image", "vision", "reading pictures")
    settings, named = model_settings(source), folder_of(source)
    try:
        with as_folder(source) as folder, quiet():
            loaded = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
            blank = np.zeros((40, 60, 3), dtype=np.uint8)
            shapes = {Processor(loaded, (0, 0))(pixels).shape for pixels in (blank, blank.transpose(1, 0, 2))}
    except LIBRARY_ERRORS as error:
        raise IncompatibleError(
            f"transformers cannot load the image processor of {named}",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:300]}"],
            next_step="check preprocessor_config.json in that folder",
        ) from error
    problems = [f"wide and high pictures become {sorted(shapes)}"] if len(shapes) != 1 else []
    made = next(iter(shapes))
    problems += _size_problems(settings, made) if not problems else []
    if problems:
        raise IncompatibleError(
            f"the image processor of {named} does not make what the model takes",
            reasons=problems,
            next_step="correct preprocessor_config.json: one height and width (or a shortest edge, then a crop)",
        )
    return Processor(loaded, (made[1], made[2]))


def _size_problems(settings: Mapping[str, Any], made: Sequence[int]) -> Iterator[str]:
    """Yields a text for each reason why the model refuses arrays of the shape `made`, (3, height, width)."""
    from offsite.models.families.architectures import ARCHITECTURES

    family = ARCHITECTURES.get(str(settings.get("model_type")))
    inner = settings.get("vision_config", settings)
    patch, side = inner.get("patch_size"), inner.get("image_size")
    if isinstance(patch, int) and (made[1] % patch or made[2] % patch):
        yield f"it makes {made[1]} x {made[2]} pixels, which patches of {patch} do not fill"
    fits = family is not None and family.vision is not None and family.vision.any_size
    if not fits and isinstance(side, int) and (made[1], made[2]) != (side, side):
        yield f"it makes {made[1]} x {made[2]} pixels, the model has positions for {side} x {side}"
