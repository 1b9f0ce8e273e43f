"""Changes errors about a bundle, whose signed files the data owner cannot correct, and those that libraries raise."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from offsite.errors import IncompatibleError, OffsiteError
from offsite.progress import Event, Progress

_NEXT_STEP = (
    "ask the model's owner for another bundle, and send this message along; nothing in a signed bundle can be corrected"
)
# `LookupError` has KeyError and IndexError below it, `RuntimeError` the errors of torch, `ArithmeticError` overflows.
_OF_LIBRARIES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass
class Watched:
    """A progress callback of the caller; it remembers the exception that it raised, which is not the bundle's fault."""

    progress: Progress
    raised: BaseException | None = None

    def __call__(self, event: Event) -> None:
        """Pass an event to the callback."""
        try:
            self.progress(event)
        except BaseException as error:
            self.raised = error
            raise


@contextlib.contextmanager
def as_sent(progress: Watched | None = None) -> Iterator[None]:
    """Context manager: an IncompatibleError in its body advises to ask the model's owner for another bundle.

    The functions that open models also serve the model's owner, so by default their errors advise to correct the files.
    An exception of a library becomes an IncompatibleError too, as libraries raise many kinds for a hostile config.
    Exceptions of other kinds pass, and so do those that the caller's `progress` raises.
    """
    try:
        yield
    except IncompatibleError as error:
        raise type(error)(error.what, reasons=error.reasons, next_step=_NEXT_STEP) from error
    except OffsiteError:
        raise
    except Exception as error:
        if progress is not None and progress.raised is error:
            raise
        if not isinstance(error, _OF_LIBRARIES) and type(error) is not Exception:  # tokenizers raises bare ones
            raise
        raise IncompatibleError(
            "the bundle's model does not run",
            reasons=[f"{type(error).__name__}: {str(error).strip()[:500]}"],
            next_step=_NEXT_STEP,
        ) from error
