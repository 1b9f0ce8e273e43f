"""Context managers and arguments to call transformers and PEFT offline, without their output, with offsite's errors.

The module itself imports no torch.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from offsite.errors import IncompatibleError, OffsiteError
from offsite.extras import require
from offsite.models.families.architectures import Architecture

OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Exceptions that transformers and PEFT raise for a config or weights that they cannot make a model of.
LIBRARY_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, IndexError)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silence progress bars and warnings of transformers and PEFT in its body."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|huggingface_hub)(\..*)?$")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def incompatible(
    folder: Path,
    verb: Literal["load", "run"] = "load",
    next_step: str = "check that the folder is complete and of a supported model type",
) -> Iterator[None]:
    """Context manager: turn any exception of a library in its body into an IncompatibleError that names `folder`.

    `verb` is what the body does with the model.
    """
    try:
        yield
    except (OffsiteError, MemoryError):
        raise
    except Exception as error:  # for a hostile config, a library may raise any exception
        if verb == "run" and isinstance(error, OSError):  # a model that runs reads no files; the terminal may be closed
            raise
        raise IncompatibleError(
            f"transformers cannot {verb} {folder}",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:500]}"],
            next_step=next_step,
        ) from error


def require_library(family: Architecture | None, folder: Path) -> None:
    """Import the optional package that builds the models of a family, if the family needs one.

    Args:
        family: the family; None (not in the table) needs no package.
        folder: the model's folder, for the error.

    Raises:
        UsageError: the package is not installed.
        IncompatibleError: the package is installed but cannot be imported.
    """
    if family is not None and family.vision is not None and family.vision.extra:
        with incompatible(folder):  # torchvision for another torch is installed, but fails to import
            require(family.vision.extra, family.vision.extra, f"a model of type {family.model_type}")
