"""The errors that users see, with the exit code of each.

    OffsiteError            1   the environment failed: disk full, unwritable folder, broken file
    ├── UsageError          2   a setting or an argument is wrong
    │   └── DataError       2   a row of a data set is wrong
    ├── VerificationError   3   a received bundle, return or plug-in is not valid
    ├── IncompatibleError   4   a model, base or return is not supported or does not fit
    └── PolicyError         5   valid, but the party's policy refuses it

Every error says what was wrong, lists every reason at once, and names the next step.
"""

from collections.abc import Sequence


class OffsiteError(Exception):
    """Base class of all errors that a user can act on; the command line prints them without a traceback.

    Args:
        what: one sentence that says what went wrong.
        reasons: every mismatch, each with the found and the expected value.
        next_step: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, reasons: Sequence[str] = (), next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.reasons = tuple(reasons)
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [self.what, *(f"  - {reason}" for reason in self.reasons)]
        if self.next_step:
            lines.append(f"Next: {self.next_step}")
        return "\n".join(map(one_line, lines))


def one_line(text: str) -> str:
    """Escape every control character of a text, also line ends: text of the other party can then write no line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(OffsiteError):
    """A setting or an argument is wrong."""

    exit_code = 2


class DataError(UsageError):
    """A data set is empty, cannot be read, or has a wrong row; `reasons` name the row's file, line and field."""


class VerificationError(OffsiteError):
    """A bundle, return or plug-in failed verification; reasons list every failure."""

    exit_code = 3


class IncompatibleError(OffsiteError):
    """Two artifacts do not fit together, or this software does not support a model or an artifact."""

    exit_code = 4


class PolicyError(OffsiteError):
    """The artifact is genuine, but the party's policy refuses the operation."""

    exit_code = 5


class StorageError(OffsiteError):
    """A file could not be read or written, for example for lack of space or permission, or because it is truncated."""
