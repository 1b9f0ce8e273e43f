"""Which regular expressions a tokenizer in a bundle may hold: those that end soon on every text. Torch-free.

The tokenizer's engine (Oniguruma) backtracks, so an expression may take years on a short text. The forms that do so
are refused: a repeated group whose content can match in several ways, references and recursion, and long chains of
repetitions.
"""

import re
from dataclasses import dataclass

_LONGEST, _DEEPEST = 4096, 32  # characters; groups in each other
_MOST_TIMES = 1000  # of a counted repetition
_MOST_REPEATS = 3  # unbounded repetitions one after the other; each adds a power of the text's length to the time
_GROUP = re.compile(r"\(\?(?:[imsx]*(?:-[imsx]+)?:|=|!|<=|<!|>|[imsx]+\))")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_REFERENCE = re.compile(r"\\[1-9kgKG]")


@dataclass
class _Group:
    """An open group of an expression while it is read."""

    repeats: int = 0  # unbounded repetitions in the present alternative
    most: int = 0  # of all alternatives until now
    fixed: bool = True  # whether it matches in one way only: no alternatives, nothing optional or repeated without end


def regex_problem(pattern: object) -> str | None:
    """Why an expression is refused; None if it is permitted."""
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        return f"a regular expression is a text of at most {_LONGEST} characters"
    try:
        _read(pattern)
    except ValueError as problem:
        return f"regular expression {pattern[:60]!r}: {problem}"
    return None


def _read(pattern: str) -> None:
    """Read an expression once, and raise ValueError at the first form that is refused."""
    at, stack, closed = 0, [_Group()], None  # closed: the group that has just ended, to which a repetition applies
    while at < len(pattern):
        letter, before = pattern[at], closed
        closed = None
        if letter == "\\":
            if _REFERENCE.match(pattern, at):
                raise ValueError("it refers to a group")
            at += 2
        elif letter == "[":
            at = _end_of_class(pattern, at)
        elif letter == "(":
            at = _open(pattern, at, stack)
        elif letter == ")":
            closed = _close(stack)
            at += 1
        elif letter == "|":
            group = stack[-1]
            group.most, group.repeats, group.fixed = max(group.most, group.repeats), 0, False
            at += 1
        elif letter in "*+?" or (letter == "{" and _COUNT.match(pattern, at)):
            at = _repeat(pattern, at, stack[-1], before)
        else:
            at += 1
        if stack[-1].repeats > _MOST_REPEATS:
            raise ValueError(f"over {_MOST_REPEATS} repetitions follow each other")
    if len(stack) > 1:
        raise ValueError("a group has no end")


def _open(pattern: str, at: int, stack: list[_Group]) -> int:
    """Open the group at `at`; returns the place after its beginning. A switch such as (?i) opens none."""
    if len(stack) > _DEEPEST:
        raise ValueError("its groups are nested too deeply")
    if pattern.startswith("(*", at):
        raise ValueError("it has a kind of group that is not permitted")
    if not pattern.startswith("(?", at):
        stack.append(_Group())
        return at + 1
    found = _GROUP.match(pattern, at)
    if not found:
        raise ValueError("it has a kind of group that is not permitted")
    if not found[0].endswith(")"):
        stack.append(_Group())
    return found.end()


def _close(stack: list[_Group]) -> _Group:
    """Close the innermost group, count what it repeats for the group around it, and return it."""
    if len(stack) == 1:
        raise ValueError("a group ends that never began")
    closed = stack.pop()
    stack[-1].repeats += max(closed.repeats, closed.most)
    stack[-1].fixed &= closed.fixed
    return closed


def _end_of_class(pattern: str, at: int) -> int:
    """The place after the character class that begins at `at`; classes may be nested."""
    depth, place = 0, at
    while place < len(pattern):
        letter = pattern[place]
        if letter == "\\":
            place += 2
            continue
        if letter == "[":
            depth += 1
            place += 2 if pattern[place + 1 : place + 2] == "^" else 1
            if pattern[place : place + 1] == "]":  # a bracket at the start of a class is one of its letters
                place += 1
            continue
        if letter == "]":
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    raise ValueError("a character class has no end")


def _repeat(pattern: str, at: int, inside: _Group, repeated: _Group | None) -> int:
    """Read the repetition at `at`; returns the place after it.

    `inside` is the group that it stands in, `repeated` the group that it repeats (None: a single character).
    """
    counted = _COUNT.match(pattern, at) if pattern[at] == "{" else None
    end = counted.end() if counted else at + 1
    if counted:
        numbers = [int(one) for one in (counted[1], counted[3]) if one]
        if any(number > _MOST_TIMES for number in numbers):
            raise ValueError(f"it repeats over {_MOST_TIMES} times")
        once, endless = counted[0] == f"{{{counted[1]}}}", bool(counted[2]) and not counted[3]
    else:
        once, endless = False, pattern[at] in "*+"
    if repeated is not None and (endless or counted) and not repeated.fixed:
        raise ValueError("it repeats a group that can match in several ways")
    inside.repeats += endless
    inside.fixed &= once
    return end + (pattern[end : end + 1] in ("?", "+"))  # lazy or possessive
