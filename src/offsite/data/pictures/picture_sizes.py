"""The size of pictures before any is decoded: tokens of one picture, and bytes of its pixels. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offsite.data.pictures.picture_files import Picture
from offsite.errors import IncompatibleError
from offsite.models.families.family import Architecture
from offsite.models.model_folder import Source, folder_of, read_bytes
from offsite.storage.strict_json import strict_json

CACHE_BYTES = 2**30  # most memory for decoded pictures in a stage; all others are decoded again at each use


@dataclass(frozen=True)
class SeenPicture:
    """The size of every picture after a model's image processor, as the encoder reads it."""

    height: int
    width: int
    tokens: int  # patches, and the tokens before them, such as the class token

    @property
    def bytes(self) -> int:
        """Bytes of the picture's pixels in fp32."""
        return 4 * 3 * self.height * self.width


def at_once(each: int, tokens: int) -> int:
    """The least number of pictures that have at least `tokens` tokens together, if one picture has `each` tokens."""
    return -(-tokens // each)


_PROCESSOR = "preprocessor_config.json"


def seen_picture(source: Source, family: Architecture, config: Mapping[str, Any]) -> SeenPicture:
    """The size of the pictures that a model's image processor makes, read from the processor's settings.

    Args:
        source: the model's folder, or its verified files.
        family: the architecture of the model.
        config: the model's config.

    Raises:
        IncompatibleError: this size does not follow from the settings.
    """
    try:
        settings = strict_json(read_bytes(source, _PROCESSOR))
        size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        height, width = (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompatibleError(
            f"{folder_of(source) / _PROCESSOR} does not say how large pictures become",
            reasons=[f"{type(error).__name__}: {str(error)[:200]}"],
            next_step=f"correct {_PROCESSOR}: name height and width as size, or as crop_size with do_center_crop",
        ) from None
    patch = int(config.get("patch_size", 16))
    before = family.vision.before if family.vision else ()
    others = sum(int(word) if word.isdigit() else int(config.get(word, 0)) for word in before)
    return SeenPicture(height, width, (height // patch) * (width // patch) + others)


def picture_count(seen: SeenPicture, config: Mapping[str, Any], tokens: int) -> int:
    """The number of pictures that have about `tokens` patches together; at least 1.

    Args:
        seen: the size of one picture.
        config: the model's config, with the size of a patch.
        tokens: the number of patches.
    """
    return max(1, tokens // (seen.height * seen.width // int(config.get("patch_size", 16)) ** 2))


def spread(listed: Sequence[Picture], count: int) -> Sequence[Picture]:
    """At most `count` pictures, evenly spaced over the list."""
    count = min(count, len(listed))
    return [listed[i * len(listed) // count] for i in range(count)]
