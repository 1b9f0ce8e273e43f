"""Finds the words of a conversation that a chat template leaves out: earlier reasoning, system turns, unknown tools."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offsite.data.conversations.parse_messages import REASONING_KEYS, Turn

_TELLING = 4  # least number of characters of a description that is not in a text by chance
_WORD = re.compile(r"\w+")


def dropped_words(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None, text: str) -> Counter[str]:
    """Count the turns and tool definitions whose words are missing from the rendered text.

    Args:
        turns: the conversation.
        tools: definitions of tools; None if the row has none.
        text: the text that the template rendered.

    Returns:
        The number of turns (or tool definitions) that lost words, by kind of words, such as "reasoning".
    """
    dropped: Counter[str] = Counter()
    for turn in turns:
        dropped.update({kind for kind, words in _pieces(turn) if not _written(words, text)})
    called = Counter(name for turn in turns for name in _called(turn))
    for name, count in called.items():
        defined = sum(_is_defined(tool, count, text) for tool in tools or () if _name(tool) == name)
        dropped["tool calls"] += min(count, max(0, count + defined - text.count(name)))
    for tool in tools or ():
        dropped["tool definitions"] += not _is_defined(tool, called[_name(tool)], text)
    return +dropped


def survives(turn: Turn, text: str) -> bool:
    """Whether the text contains at least one word of a turn; True for a turn without words."""
    pieces = [*(piece for _, piece in _pieces(turn)), *_called(turn)]
    words = [found[0] for piece in pieces if (found := _WORD.search(piece))]  # mostly the first word is in the text
    if not words:
        return True
    lowered = text.casefold()
    if any(word.casefold() in lowered for word in words):
        return True
    return any(word.casefold() in lowered for piece in pieces for word in _WORD.findall(piece))


def _pieces(turn: Turn) -> Iterator[tuple[str, str]]:
    """Yields the pieces of a turn, each as (kind, words), for example ("reasoning", ...) or ("tool results", ...)."""
    for key in REASONING_KEYS:
        if isinstance(turn.more.get(key), str):
            yield "reasoning", turn.more[key]
    for content in [part["text"] for part in turn.parts] or [turn.content]:
        thought, closed, rest = content.rpartition("</think>")
        if turn.role == "assistant" and closed:
            yield "reasoning", thought.partition("<think>")[2] if "<think>" in thought else thought
            content = rest
        yield (
            "tool results" if turn.role in ("tool", "ipython", "function", "observation") else f"{turn.role} turns",
            content,
        )


def _called(turn: Turn) -> Iterator[str]:
    """The names of the tools that a turn calls."""
    return (call["function"]["name"] for call in turn.more.get("tool_calls", ()))


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a tool, from its definition."""
    return str(tool.get("function", tool).get("name"))


def _is_defined(tool: Mapping[str, Any], calls: int, text: str) -> bool:
    """Whether the text contains the definition of a tool: its description, or its name more often than in calls.

    `calls` is the number of calls of this tool in the conversation.
    """
    description = tool.get("function", tool).get("description")
    if isinstance(description, str) and len(description) >= _TELLING:
        return _written(description, text)
    return text.count(_name(tool)) > calls


def _written(words: str, text: str) -> bool:
    """Whether the text contains the words, as they are or escaped as in JSON."""
    stripped = words.strip()
    escaped = (json.dumps(stripped, ensure_ascii=ascii_alone)[1:-1] for ascii_alone in (False, True))
    return stripped in text or any(form in text for form in escaped)
