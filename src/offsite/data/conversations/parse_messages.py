"""Messages of a data set -> turns: OpenAI's format, ShareGPT's "from" and "value", tool calls, content in parts.

A turn keeps all other fields of a message (name, reasoning, tool calls), since the chat template may write them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
    "environment",
    "document",
)
OTHER_NAMES = {  # the names of these roles in public data sets
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_TOOL_CALL, _TOOL_RESULT = "function_call", ("observation", "function_response", "tool_response")  # roles of ShareGPT
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "parts")
_TRAINED_KEYS = ("weight", "train", "loss")  # fields whose value 0 or false means that a turn is not learnt
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts that are text
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: a message of one side."""

    role: str  # one of ROLES
    content: str  # its text; if it was written in parts, the texts of all parts joined
    parts: tuple[Mapping[str, Any], ...] = ()  # the parts, if the content was written in parts
    more: Mapping[str, Any] = field(default_factory=dict)  # all other fields of the message, without nulls
    learnt: bool = True  # whether an assistant's turn has labels

    @property
    def message(self) -> dict[str, Any]:
        """The message in the format of transformers."""
        content: Any = [dict(part) for part in self.parts] if self.parts else self.content
        said = {"content": content} if content or "tool_calls" not in self.more else {}
        return {"role": self.role, **said, **self.more}


def parse_messages(value: object, name: str) -> tuple[list[Turn], list[str]]:
    """Parse a list of messages.

    Args:
        value: the list, or a JSON text of the list.
        name: the name of the field, for error messages.

    Returns:
        The turns, and one text for each problem; without problems the second list is empty.
    """
    value = parsed_json(value)
    if not isinstance(value, list) or not value:
        return [], [f"field {name!r} is {kind_of(value)}, expected a list of {{'role', 'content'}}"]
    turns, problems = [], []
    for i, message in enumerate(value):
        turn = _parse_message(message, f"{name}[{i}]")
        if isinstance(turn, Turn):
            turns.append(turn)
        else:
            problems.append(turn)
    return turns, problems


def _parse_message(message: object, where: str) -> Turn | str:
    """Parse one message; returns an error text if it is malformed.

    `where` is the place of the message in the field, for error messages.
    """
    if not isinstance(message, Mapping):
        return f"field '{where}' has {kind_of(message)}, expected 'role' and 'content'"
    fields = {key: value for key, value in message.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in fields), None)
    content_key = next((key for key in _CONTENT_KEYS if key in fields), None)
    calls = fields.get("tool_calls") or fields.get("function_call")
    if role_key is None or (content_key is None and not calls):
        found = ", ".join(map(repr, message))
        return f"field '{where}' has {found[:80] or 'nothing'}, expected 'role' and 'content'"
    role = _parse_role(fields[role_key], sharegpt=role_key == "from")
    content = fields.get(content_key, "") if content_key else ""
    if role == _TOOL_CALL:
        role, calls, content = "assistant", content, ""
    if role not in ROLES:
        return f"field '{where}.{role_key}' is {str(fields[role_key])[:40]!r}, expected {', '.join(ROLES)}"
    text, parts = _parse_content(content)
    thinks = any(fields.get(key) for key in REASONING_KEYS)
    problem = text_problem(
        f"{where}.{content_key or 'content'}", text, empty=role != "assistant" or bool(calls) or thinks
    )
    if problem:
        return problem
    skipped = {*_ROLE_KEYS, *_CONTENT_KEYS, *_TRAINED_KEYS, "tool_calls", "function_call"}
    more = {key: value for key, value in fields.items() if key not in skipped}
    if calls:
        made = _parse_calls(calls)
        if isinstance(made, str):
            return f"field '{where}.tool_calls' {made}"
        more["tool_calls"] = made
    learnt = all(fields.get(key, True) not in (0, False) for key in _TRAINED_KEYS)
    return Turn(role, str(text), parts, more, learnt)


def _parse_role(value: object, *, sharegpt: bool) -> str:
    """The usual name of a message's role, from its name in the file.

    With `sharegpt` the message is in ShareGPT's format, which has other names for the role of tool results.
    """
    role = str(value).strip().casefold()
    if sharegpt and role in _TOOL_RESULT:
        return "tool"
    return OTHER_NAMES.get(role, role)


def _parse_content(content: object) -> tuple[object, tuple[Mapping[str, Any], ...]]:
    """The text of a message, and its parts if it was written in parts. Content without text is returned unchanged."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return content, ()
    parts: list[Mapping[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        filled = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
        if filled.get("type", "text") not in _TEXT_PARTS or not isinstance(filled.get("text"), str):
            return part, ()
        parts.append({**filled, "type": "text"})
    return "".join(part["text"] for part in parts), tuple(parts)


def _parse_calls(calls: object) -> list[dict[str, Any]] | str:
    """Tool calls in the format of chat templates, {"type", "function": {"name", "arguments"}}; arguments are an object.

    Returns an error text if the calls are malformed.
    """
    calls = parsed_json(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        return f"is {kind_of(calls)}, expected a list of calls"
    made = []
    for call in calls:
        outer = {key: value for key, value in call.items() if value is not None} if isinstance(call, Mapping) else {}
        inner = outer.get("function", outer)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return "holds a call without a function's name"
        arguments = parsed_json(inner.get("arguments", inner.get("parameters")))
        function = {key: value for key, value in inner.items() if key != "parameters"}
        function["arguments"] = {} if arguments in (None, "") else arguments
        made.append(
            {**outer, "function": function} if "function" in outer else {"type": "function", "function": function}
        )
    return made


def parse_tools(value: object) -> list[Mapping[str, Any]] | str:
    """Parse definitions of tools from a list, or from a JSON text of it; returns an error text if malformed."""
    value = parsed_json(value)
    if value is None or value in ("", []):
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        return f"field 'tools' is {kind_of(value)}, expected a list of tools"
    return list(value)


def without_nulls(value: Any) -> Any:
    """A value of a table without null fields. Arrow adds them to objects that lack a key which another row has."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def parsed_json(value: object) -> object:
    """The parsed list or object if a value is a JSON text of one; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def text_problem(name: str, value: object, *, empty: bool = False) -> str | None:
    """The problem of a field that must contain text; None if there is none.

    Args:
        name: the name of the field.
        value: the value of the field.
        empty: whether empty text is allowed.
    """
    if not isinstance(value, str):
        return f"field {name!r} is {kind_of(value)}, expected a string"
    if not value and not empty:
        return f"field {name!r} is empty"
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        return f"field {name!r} holds half of a surrogate pair, which is no text"
    return None


def kind_of(value: object) -> str:
    """The kind of a value, such as "a list of 3", for error messages."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping) and isinstance(value.get("type"), str):
        return f"a part of type {value['type'][:20]!r}"
    return type(value).__name__


def words_of(turns: Sequence[Turn]) -> str:
    """The texts of all turns, joined by newlines."""
    return "\n".join(turn.content for turn in turns)
