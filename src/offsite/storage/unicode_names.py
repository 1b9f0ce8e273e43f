"""Finds files whose names were typed in one form of Unicode and are stored in the other.

A letter with an accent is one character (NFC) or a letter and an accent (NFD); both look the same. Keyboards type the
first form, and folders that were packed on a Mac have the second.
"""

import unicodedata
from pathlib import Path


def existing(path: Path) -> Path:
    """The path in the Unicode form (NFC or NFD) in which the disk stores it; unchanged if it exists in neither."""
    if _exists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found /= next((form for form in forms if _exists(found / form)), part)
    return found if _exists(found) else path


def _exists(path: Path) -> bool:
    """Whether something exists at the path, even a broken link."""
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name that is too long
        return False
