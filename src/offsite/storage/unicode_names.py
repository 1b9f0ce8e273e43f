"""Finds files whose names are typed in one form of Unicode and stored in the other.

A letter with an accent is one character (NFC) or a letter and an accent (NFD); both look alike. A folder from a Mac's
archive has the second form, a keyboard types the first.
"""

import unicodedata
from pathlib import Path


def existing(path: Path) -> Path:
    """The path as the disk spells it; the same path if nothing has that name in either form."""
    if _exists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found /= next((form for form in forms if _exists(found / form)), part)
    return found if _exists(found) else path


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name that is too long
        return False
