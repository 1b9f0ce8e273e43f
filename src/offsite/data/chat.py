"""Conversations -> token ids through the tokenizer's chat template, with labels on what the assistant says.

The template renders the whole conversation once. Where an assistant's turn begins and ends in that text is known from
the template's own generation marks, or else from rendering the conversation up to that turn; a rendering that is no
beginning of the whole one is an error, not a guess. The text is cut at these places and tokenised piece by piece, so
that no token lies across the border of a label. A turn's labels end with its end-of-turn token.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offsite.data.rows import Turn
from offsite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ConversationError(Exception):
    """What keeps one conversation from being split exactly."""


def require_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot render conversations.

    Raises:
        DataError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations, and the model's tokenizer has no chat template",
            next_step='write the rows as {"prompt", "completion"}, or take a model that was tuned for chat',
        )


def conversation_ids(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and the positions among them that carry a label.

    Nothing is added to what the template renders: neither a beginning nor an end token.

    Raises:
        ConversationError: the template refuses the conversation, or what the assistant says cannot be told exactly.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole, spans = _marked(messages, tokenizer) if _has_marks(tokenizer) else _rendered(messages, tokenizer)
    ends = _added_tokens(tokenizer)
    ids: list[int] = []
    labelled: list[int] = []
    at = 0
    for i, (begin, end) in enumerate(spans):
        ids += _ids(whole[at:begin], tokenizer)
        said = _ids(whole[begin:end], tokenizer)
        at = spans[i + 1][0] if i + 1 < len(spans) else len(whole)
        after = _ids(whole[end:at], tokenizer)
        at_end = _turn_end(said, after, ends, tokenizer)
        labelled += range(len(ids), len(ids) + at_end)
        ids += said + after
    return ids, [place for place in labelled if place > 0]  # nothing predicts the first token


def _turn_end(said: list[int], after: list[int], ends: frozenset[int], tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens from the turn's beginning carry a label: up to its end-of-turn token, that one included."""
    last = max((i for i, token in enumerate(said) if token in ends), default=None)
    if last is not None and not str(tokenizer.decode(said[last + 1 :])).strip():
        return last + 1
    for i, token in enumerate(after):  # generation marks may leave the end-of-turn token outside
        if token in ends and (token != tokenizer.bos_token_id or token == tokenizer.eos_token_id):
            return len(said) + i + 1
        if str(tokenizer.decode([token])).strip():
            break
    raise ConversationError("the chat template puts no end-of-turn token after what the assistant says")


def _rendered(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, list[tuple[int, int]]]:
    whole = _render(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ConversationError("it begins with the assistant, and the chat template does not mark what that says")
        before = _render(messages[:i], tokenizer, asks=True)
        until = _render(messages[: i + 1], tokenizer)
        if not whole.startswith(until) or not until.startswith(before) or len(until) == len(before):
            raise ConversationError(
                f"the chat template cannot be split exactly at messages[{i}]: "
                "what it writes there depends on what follows"
            )
        said = until[len(before) :].lstrip()
        if before == _render(messages[:i], tokenizer) and not said.startswith(message["content"].strip()):
            raise ConversationError(
                f"the chat template cannot be split exactly at messages[{i}]: "
                "it has no generation prompt, so its heading of the turn cannot be told from what is said"
            )
        spans.append((len(before), len(until)))
    return whole, spans


def _render(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", *, asks: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConversationError(f"the chat template refuses it: {str(error)[:200]}") from None


def _has_marks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return isinstance(tokenizer.chat_template, str) and _MARKED.search(tokenizer.chat_template) is not None


def _marked(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        texts, places = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **special,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConversationError(f"the chat template refuses it: {str(error)[:200]}") from None
    spans = [(int(begin), int(end)) for begin, end in places[0]]
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != turns:
        raise ConversationError(f"the chat template marks {len(spans)} assistant turns, the row has {turns}")
    return str(texts[0]), spans


def _added_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
