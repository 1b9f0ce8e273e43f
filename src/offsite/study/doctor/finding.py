"""A finding of the examination: a problem, which stops work, or advice."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        level: "problem" if a command would fail, "advice" if it would work less well or not yet.
        what: what was found.
        next_step: what to do about it.
        exit_code: the exit code of the examination if this is its first problem.
    """

    level: Literal["problem", "advice"]
    what: str
    next_step: str
    exit_code: int = 1


def exit_code_of(findings: list[Finding]) -> int:
    """The exit code of an examination: 0 without a problem, else that of the first one."""
    return next((one.exit_code for one in findings if one.level == "problem"), 0)
