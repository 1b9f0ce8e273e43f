"""Conversations -> text and labels on what the assistant says, as the tokenizer's chat template really writes it.

The template renders the whole conversation once; that text alone is tokenised. Where an assistant's turn begins in it
is found by the template's own generation marks, or else by rendering the conversation up to that turn and comparing,
or else by rendering it with other words in that turn's place. Templates that write an earlier turn differently (some
drop its reasoning) are thereby labelled as they write it. Where earlier turns cannot be found, the last answer alone
is learnt, and that is reported. A turn's labels end with its end-of-turn token.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offsite.data.answer_spans import AnswerFinder
from offsite.data.chat_template import ChatTemplate, ConversationError, Message, Span
from offsite.data.dropped_words import dropped_words, survives
from offsite.data.messages import Turn

LAST_ANSWER_ALONE = "conversations learnt by their last answer alone"
END_ADDED = "answers given an end token that the template lacks"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the model reads it."""

    text: str
    labelled: tuple[Span, ...]  # characters that carry labels, ascending
    lacks_end: bool = False  # whether no token of the template ends the last answer, so that EOS is to be added
    dropped: Mapping[str, int] = field(default_factory=dict)  # what the template did not write, by name
    notes: Mapping[str, int] = field(default_factory=dict)  # what was labelled otherwise than answer by answer


def read_conversation(turns: Sequence[Turn], template: ChatTemplate, settings: Mapping[str, Any]) -> Conversation:
    """Render a conversation and find what the assistant says in it.

    Args:
        turns: the conversation.
        template: of the model's tokenizer.
        settings: tools and other arguments for the template.

    Raises:
        ConversationError: the template refuses it or writes nothing of it, or no answer can be found.
    """
    messages, text = template.takes(turns, settings)
    if not any(survives(turn, text) for turn in turns if turn.role == "assistant" and turn.learnt):
        raise ConversationError("the chat template writes no word of what the assistant says")
    spans, alone = _labelled(turns, messages, text, template, settings)
    ends_open = turns[-1].role == "assistant" and turns[-1].learnt
    lacks_end = ends_open and not template.ends_in_special(text[slice(*spans[-1])])
    if lacks_end:  # what the template writes behind the answer is learnt with the end token
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
    """The stretches that carry labels, and whether the last answer alone could be found."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    marked = template.render_marked(messages, settings)
    if len(marked) == len(answers):
        paired = zip(marked, answers, strict=True)
        spans = [span for span, turn in paired if turn.learnt and survives(turn, text)]
        return [_with_end(span, text, template) for span in spans], False
    if marked and all(turn.learnt for turn in answers):
        return [_with_end(span, text, template) for span in marked], False
    found, alone = AnswerFinder(turns, messages, text, template, settings).find()
    spans = [span for i, span in found.items() if turns[i].learnt]
    if not spans:
        raise ConversationError("the only answer that can be found is not to be learnt")
    return spans, alone


def _with_end(span: Span, text: str, template: ChatTemplate) -> Span:
    """A marked stretch, with the end-of-turn token that marks may leave outside."""
    begin, end = span
    if template.ends_in_special(text[begin:end]):
        return span
    if template.end:
        return begin, end + (len(template.end) if text.startswith(template.end, end) else 0)
    return begin, template.special_after(text, end) or end
