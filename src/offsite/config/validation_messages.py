"""Turns pydantic's validation errors into messages that name the settings by their keys."""

import re
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from offsite.config.spec import RulesError, Spec
from offsite.spelling import nearest


@dataclass(frozen=True)
class Problem:
    """One problem that pydantic reports about a set of values: its location and its message."""

    place: tuple[str, ...]  # pydantic's error location without the group's name; (): settings contradict each other
    what: str
    unknown: bool = False  # the key is not the name of a setting

    def __str__(self) -> str:
        # keys may come from the other party, so control characters must not reach the terminal
        where = ".".join(part if part.isprintable() else ascii(part) for part in self.place)
        return f"{where or 'settings'}: {self.what}"


def problems_of(error: ValidationError, kind: type[Spec] | None = None) -> list[Problem]:
    """List every problem that a pydantic validation error reports; a broken rule of a spec is a problem of its own.

    Args:
        error: pydantic's error.
        kind: the class of the spec that was validated: the names of its groups are left out of pydantic's error
            locations. None: another model of pydantic; its error locations are used as they are.
    """
    found = []
    for problem in error.errors(include_url=False):
        broken = problem.get("ctx", {}).get("error")
        if isinstance(broken, RulesError):
            found += [Problem((), message) for message in broken.messages]
            continue
        place = problem["loc"][1:] if kind and problem["loc"][:1] in kind.group_places() else problem["loc"]
        what = f"{problem['msg']} (found {repr(problem['input'])[:80]}){_meant(problem)}"
        found.append(Problem(tuple(str(part)[:80] for part in place), what, problem["type"] == "extra_forbidden"))
    return found


def _meant(problem: ErrorDetails) -> str:
    """The choice that a wrong value resembles, as the end of a message; empty if there is none."""
    choices = re.findall(r"'([^']+)'", problem.get("ctx", {}).get("expected", ""))
    close = nearest(str(problem["input"])[:80], choices) if problem["type"] == "literal_error" else None
    return f"; did you mean {close!r}?" if close else ""


def describe_validation(error: ValidationError, kind: type[Spec] | None = None) -> list[str]:
    """Describe every problem of a pydantic validation error in one line: which key, the fault, and the value found.

    Args:
        error: pydantic's error.
        kind: the class of the spec that was validated: the names of its groups are left out of pydantic's error
            locations. None: another model of pydantic; its error locations are used as they are.
    """
    return [str(problem) for problem in problems_of(error, kind)]
