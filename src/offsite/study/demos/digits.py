"""Reads handwritten digits that come inside the wheel of scikit-learn: 1797 pictures of 8 x 8 pixels in 10 classes.

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI, 1998). The package is
not imported; its file is read.
"""

import gzip
import importlib.util
import io
from pathlib import Path

import numpy as np

from offsite.errors import DataError, UsageError
from offsite.extras import install_command, require
from offsite.storage.files import staged_folder

_FILE = Path("datasets", "data", "digits.csv.gz")
_SIDE, _GREATEST = 8, 16  # side length in pixels; the value of full ink
_SHOWN = 96  # side length in pixels of an enlarged digit, which looks smooth and not like tiles


def digits_file() -> Path:
    """The path of the file of digits in the installed scikit-learn; the file is not read.

    Raises:
        UsageError: scikit-learn is not installed, or does not contain the file.
    """
    found = importlib.util.find_spec("sklearn")
    places = found.submodule_search_locations if found else None
    file = Path(places[0]) / _FILE if places else None
    if file is None or not file.is_file():
        raise UsageError(
            "no pictures were named, and the handwritten digits of scikit-learn are not installed",
            reasons=[f"there is no {file}"] if file else [],
            next_step=f"{install_command('demo-vision')}, or name a folder with a sub-folder of pictures for each "
            "class: --images FOLDER",
        )
    return file


def write_digits(source: Path, out: Path) -> dict[str, int]:
    """Write every digit as a PNG file into the sub-folder of its class.

    Args:
        source: from `digits_file`; a line has 64 values from 0 to 16, row after row, and the class.
        out: new folder; it appears complete or not at all.

    Returns:
        The number of digits, under the key "pictures".

    Raises:
        DataError: the file does not hold the digits.
        StorageError: the folder cannot be written.
    """
    image = require("PIL.Image", "vision", "writing pictures")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(source.read_bytes())), delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"cannot read the digits in {source}",
            reasons=[str(error)[:200]],
            next_step="reinstall scikit-learn, or name pictures of your own with --images",
        ) from None
    values, classes = table[:, :-1], table[:, -1]  # (N, 64), (N,)
    if (
        values.shape[1] != _SIDE**2
        or values.min() < 0
        or values.max() > _GREATEST
        or not set(classes) <= set(range(10))
    ):
        raise DataError(
            f"{source} does not hold the digits",
            reasons=[f"found lines of {table.shape[1]} numbers, expected {_SIDE**2} from 0 to {_GREATEST} and a class"],
            next_step="reinstall scikit-learn, or name pictures of your own with --images",
        )
    ink = (values * 255 // _GREATEST).astype(np.uint8).reshape(-1, _SIDE, _SIDE)
    with staged_folder(out) as folder:
        for number, (pixels, label) in enumerate(zip(ink, classes.tolist(), strict=True)):
            place = folder / str(label)
            place.mkdir(exist_ok=True)
            enlarged = image.fromarray(pixels).resize((_SHOWN, _SHOWN), image.Resampling.BICUBIC)
            enlarged.save(place / f"{number:04}.png")
    return {"pictures": len(ink)}
