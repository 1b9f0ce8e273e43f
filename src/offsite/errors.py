"""The errors that users see, and the exit code of each.

    OffsiteError            1   the environment failed: disk full, unwritable folder, broken file
    ├── UsageError          2   a setting or an argument is wrong
    │   └── DataError       2   a row of a data set is wrong
    ├── VerificationError   3   what the other party sent is not what it must be
    ├── IncompatibleError   4   this model, base or return does not fit
    └── PolicyError         5   well-formed, but the party's policy refuses it

Every error says what was wrong, lists every reason at once, and names the next step.
"""

from collections.abc import Sequence


class OffsiteError(Exception):
    """Something that a user can understand and act on; the command line prints it without a traceback.

    Args:
        what: one sentence that says what went wrong.
        reasons: every mismatch found, each with what was found and what was expected.
        next_step: what to do about it.
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
        return "\n".join(lines)


class UsageError(OffsiteError):
    """A setting or an argument is wrong."""

    exit_code = 2


class DataError(UsageError):
    """A data set is empty, unreadable, or has a bad row; reasons name file, line and field."""


class VerificationError(OffsiteError):
    """A bundle or a return failed verification; reasons list every failure."""

    exit_code = 3


class IncompatibleError(OffsiteError):
    """Two artifacts, or an artifact and this software, do not fit together."""

    exit_code = 4


class PolicyError(OffsiteError):
    """The artifact is genuine, but the party's policy refuses what is asked."""

    exit_code = 5


class StorageError(OffsiteError):
    """A file could not be read or written: no space, no permission, or truncated."""
