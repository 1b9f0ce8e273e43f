"""Finds the words of a conversation that a chat template omits: earlier reasoning, system turns, unknown tools."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from offsite.data.messages import REASONING_KEYS, Turn

_WORD = re.compile(r"\w+")


def dropped_words(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None, text: str) -> Counter[str]:
    """Count the turns and tool definitions whose words are missing from the rendered text.

    Args:
        turns: the conversation.
        tools: definitions of tools.
        text: the text that the template rendered.

    Returns:
        The number of turns (or tool definitions) that lost words, by kind of words, such as "reasoning".
    """
    dropped: Counter[str] = Counter()
    for turn in turns:
        lost = {kind for kind, words in _pieces(turn) if not _written(words, text)}
        dropped.update(lost)
    for tool in tools or ():
        function = tool.get("function", tool)
        words = function.get("description") or function.get("name")
        dropped["tool definitions"] += isinstance(words, str) and not _written(words, text)
    return +dropped


def survives(turn: Turn, text: str) -> bool:
    """Whether the text contains at least one word of a turn; True for a turn without words."""
    words = {word for _, piece in _pieces(turn) for word in _WORD.findall(piece)}
    lowered = text.casefold()
    return not words or any(word.casefold() in lowered for word in words)


def _pieces(turn: Turn) -> Iterator[tuple[str, str]]:
    """The pieces of a turn, each as (kind, words), for example ("reasoning", ...) or ("tool calls", ...)."""
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
    for call in turn.more.get("tool_calls", ()):
        yield "tool calls", call["function"]["name"]


def _written(words: str, text: str) -> bool:
    stripped = words.strip()
    escaped = (json.dumps(stripped, ensure_ascii=ascii_alone)[1:-1] for ascii_alone in (False, True))
    return stripped in text or any(form in text for form in escaped)
