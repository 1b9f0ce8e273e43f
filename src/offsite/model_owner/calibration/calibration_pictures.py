"""Default calibration pictures: the photos in the wheel of scikit-image, cropped at many scales.

The package is not imported; its files are read. Only photos are used that its documentation marks as CC0, public
domain, or without known copyright; drawings and charts are left out.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from offsite.data.pictures.picture_files import Picture, Pixels, augmented, decode
from offsite.errors import UsageError
from offsite.extras import install_command

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
_AREA = (0.05, 1.0)  # area of a crop as a fraction of the photo: details and whole scenes
_SEED = 17  # fixed seed of the crops, so that packing is reproducible
_NEXT = (
    "or name a folder of your own pictures, which need no classes and are better, with --calibration; or pack with "
    "--select uniform --heal none"
)


def photos() -> list[Picture]:
    """The names and paths of scikit-image's photos; no file is opened.

    Raises:
        UsageError: scikit-image is not installed, or this version does not contain the photos.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise UsageError(
            "no calibration pictures were named, and those of scikit-image are not installed",
            next_step=f"{install_command('calibration-images')}, {_NEXT}",
        )
    folder = Path(found.submodule_search_locations[0]) / "data"
    missing = [name for name in PHOTOS if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            "this scikit-image does not hold the photos that calibration takes",
            reasons=[f"missing in {folder}: {', '.join(missing)}"],
            next_step=f"{install_command('calibration-images')}, {_NEXT}",
        )
    return [Picture(name, folder / name, None) for name in PHOTOS]


def has_photos() -> bool:
    """Whether scikit-image's photos are installed."""
    try:
        return bool(photos())
    except UsageError:
        return False


def crops(count: int, side: tuple[int, int]) -> Iterator[Pixels]:
    """`count` random crops, each (height, width, 3), taken from the photos in turn.

    The random numbers are seeded: equal arguments give equal crops.

    Args:
        count: number of crops.
        side: height and width of each crop in pixels.

    Raises:
        UsageError: scikit-image or its photos are not installed.
        DataError: a photo's file is damaged.
    """
    whole = [decode(photo) for photo in photos()]
    for index in range(count):
        yield augmented(whole[index % len(whole)], side, np.random.default_rng([_SEED, index]), area=_AREA)
