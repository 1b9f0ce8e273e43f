"""Conversations -> text with labels on the assistant's answers, exactly as the tokenizer's chat template renders it.

The template renders the whole conversation once, and only this text is tokenised. The start of each assistant turn in
the text is found by the template's own generation marks. Without marks, the conversation up to that turn is rendered
and compared; if that fails, the conversation is rendered with other words in the place of that turn's. So a template
that changes earlier turns (some leave out their reasoning) gets labels on its own text. If earlier turns cannot be
found, only the last answer is learnt, and this is reported. The labels of a turn include its end-of-turn token.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offsite.data.conversations.answer_spans import AnswerFinder
from offsite.data.conversations.chat_template import ChatTemplate, ConversationError, Message, Span
from offsite.data.conversations.dropped_words import dropped_words, survives
from offsite.data.conversations.parse_messages import Turn

LAST_ANSWER_ALONE = "conversations learnt by their last answer alone"
END_ADDED = "answers given an end token that the template lacks"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the text that the model reads, and the spans of the text that have labels."""

    text: str
    labelled: tuple[Span, ...]  # spans of characters that have labels, ascending
    lacks_end: bool = False  # whether the template writes no token after the last answer, so that EOS must be added
    dropped: Mapping[str, int] = field(default_factory=dict)  # number of turns that lost words, by kind of words
    notes: Mapping[str, int] = field(default_factory=dict)  # 1 for each reason why the labels are unusual


def read_conversation(turns: Sequence[Turn], template: ChatTemplate, settings: Mapping[str, Any]) -> Conversation:
    """Render a conversation and find the assistant's answers in it.

    Args:
        turns: the conversation.
        template: the chat template of the model's tokenizer.
        settings: tools and other arguments for the template.

    Raises:
        ConversationError: the template refuses the conversation or leaves out all its answers, or no answer can be
            found.
    """
    messages, text = template.takes(turns, settings)
    if not any(survives(turn, text) for turn in turns if turn.role == "assistant" and turn.learnt):
        raise ConversationError("the chat template writes no word of what the assistant says")
    spans, alone = _labelled(turns, messages, text, template, settings)
    ends_open = turns[-1].role == "assistant" and turns[-1].learnt
    lacks_end = ends_open and not template.ends_in_special(text[slice(*spans[-1])])
    if lacks_end:  # the text that the template writes after the answer is learnt too, up to EOS
        spans[-1] = (spans[-1][0], len(text))
    notes = Counter({LAST_ANSWER_ALONE: int(alone), END_ADDED: int(lacks_end)})
    return Conversation(text, tuple(spans), lacks_end, dropped_words(turns, settings.get("tools"), text), +notes)


def _labelled(
    turns: Sequence[Turn],
    messages: Sequence[Message],
    text: str,
    template: ChatTemplate,
    settings: Mapping[str, Any],
) -> tuple[list[Span], bool]:
    """The spans of the text that have labels, and whether only the last answer was found.

    Arguments as for `AnswerFinder`.

    Raises:
        ConversationError: no answer that should have labels can be found.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    marked = template.render_marked(messages, settings)
    if len(marked) == len(answers):
        paired = zip(marked, answers, strict=True)
        spans = [span for span, turn in paired if turn.learnt and survives(turn, text[slice(*span)])]
        return [_with_end(span, text, template) for span in spans], False
    if marked and all(turn.learnt for turn in answers):
        return [_with_end(span, text, template) for span in marked], False
    found, alone = AnswerFinder(turns, messages, text, template, settings).find()
    spans = [span for i, span in found.items() if turns[i].learnt]
    if not spans:
        raise ConversationError("the only answer that can be found is not to be learnt")
    return spans, alone


def _with_end(span: Span, text: str, template: ChatTemplate) -> Span:
    """A span of generation marks, extended by the end-of-turn token if the marks leave that outside."""
    begin, end = span
    if template.ends_in_special(text[begin:end]):
        return span
    if template.end:
        return begin, end + (len(template.end) if text.startswith(template.end, end) else 0)
    return begin, template.special_after(text, end) or end
