"""Optional packages: imported when they are used; an error names the extra to install."""

import importlib
from typing import Any

from offsite.errors import UsageError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional extra.

    Args:
        module: what to import; a name from this code, never from data.
        extra: the extra of this distribution that brings it.
        purpose: what needs it, as the start of a sentence.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs a package that is not installed",
            reasons=[str(error)],
            next_step=f"pip install 'offsite-tuning[{extra}]'",
        ) from None
