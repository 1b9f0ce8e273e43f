"""Import optional packages where they are used; if one is missing, the error names the extra to install."""

import importlib
from typing import Any

from offsite.errors import UsageError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import a Python module that only an extra (an optional group of dependencies) of this package installs.

    Args:
        module: the module's name; always a constant in this code, never read from data.
        extra: the extra that installs the module.
        purpose: the feature that needs the module, as the start of the error's sentence.

    Raises:
        UsageError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs a package that is not installed",
            reasons=[str(error)],
            next_step=f"pip install 'offsite-tuning[{extra}]'",
        ) from None
