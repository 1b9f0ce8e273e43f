"""Suggests the known name that a mistyped one is closest to."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of most similar spelling, upper and lower case alike; None if none is similar.

    Args:
        name: the name that was given.
        known: the names that there are.
    """
    by_spelling = {one.lower().replace("-", "_"): one for one in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_spelling, 1)
    return by_spelling[close[0]] if close else None


def suggest(name: str, known: Iterable[str]) -> str:
    """A question about the known name of most similar spelling, or if none is similar, a list of all known names.

    Args:
        name: the name that was given.
        known: the names that there are.
    """
    names = list(known)
    close = nearest(name, names)
    return f"did you mean {close!r}?" if close else f"expected one of {', '.join(names)}"
