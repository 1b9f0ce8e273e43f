"""Finds the assistant's answers in a rendered conversation, for chat templates without generation marks."""

from collections.abc import Mapping, Sequence
from typing import Any

from offsite.data.conversations.chat_template import ChatTemplate, ConversationError, Message, Span
from offsite.data.conversations.dropped_words import survives
from offsite.data.conversations.parse_messages import Turn

_OTHER_WORDS = "Zq7xOtherWords"  # replace an answer's words, to see what the template writes around them


class AnswerFinder:
    """Finds the assistant's answers in one rendered conversation.

    Args:
        turns: the conversation.
        messages: the same conversation, in the form that the template accepts.
        text: the text that the template renders from `messages`.
        template: the chat template of the tokenizer.
        settings: tools and other arguments for the template.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        messages: Sequence[Message],
        text: str,
        template: ChatTemplate,
        settings: Mapping[str, Any],
    ) -> None:
        self.turns, self.messages, self.text = turns, messages, text
        self.template, self.settings = template, settings

    def find(self) -> tuple[dict[int, Span], bool]:
        """Find the characters of each answer.

        Returns:
            The span of each answer in the text, by the index of its turn, without turns that the template leaves out;
            and whether some answers were not found (then only the last answer's span is returned).

        Raises:
            ConversationError: the last answer cannot be found.
        """
        spans: dict[int, Span] = {}
        answers = [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and survives(turn, self.text)]
        lost, at = False, 0
        for i in answers:
            begin = self._begin(i, at)
            end = self._end(i, begin) if begin is not None else None
            if begin is None or end is None or end <= begin:
                lost = True
            elif survives(self.turns[i], self.text[begin:end]):  # its words may be only elsewhere in the text
                spans[i] = (begin, end)
                at = end
        if not spans or (lost and answers[-1] not in spans):
            raise ConversationError("the chat template does not show where the assistant's last answer begins")
        return ({answers[-1]: spans[answers[-1]]} if lost else spans), lost

    def _begin(self, i: int, at: int) -> int | None:
        """The character at which the answer of turn i begins, after its heading (such as "<|assistant|>").

        None if it cannot be found. `at` is the end of the answer before it, so the answer begins there or later.
        """
        heading, asked_for = self.template.heading(self.settings)
        if i:
            try:
                before = self.template.render(self.messages[:i], self.settings, asks=True)
            except ConversationError:
                before = ""
            before += "" if asked_for else heading
            if before and before.endswith(heading) and self.text.startswith(before) and len(before) >= at:
                return len(before)
        written = self._before_words(i)
        if written is None:
            return None
        begin = self._behind_heading(written, i, at)
        return begin if begin >= at and self.text.startswith(written[:begin]) else None

    def _before_words(self, i: int) -> str | None:
        """The text that the template writes before the words of turn i; None if it cannot be found.

        It is found by rendering the conversation with other words in the place of this turn's words.
        """
        message = self.messages[i]
        others = [{**message, "content": _OTHER_WORDS}]
        if calls := message.get("tool_calls"):
            call = {**calls[0], "function": {**calls[0]["function"], "name": _OTHER_WORDS}}
            others.append({**message, "tool_calls": [call, *calls[1:]]})
        for other in others:
            try:
                text = self.template.render([*self.messages[:i], other, *self.messages[i + 1 :]], self.settings)
            except ConversationError:
                continue
            before, found, _ = text.partition(_OTHER_WORDS)
            if found:
                return before
        return None

    def _behind_heading(self, written: str, i: int, at: int) -> int:
        """The position in `written` directly after the heading of turn i.

        If there is no heading, it is the end of `written` without trailing spaces (these belong to the answer). If the
        turn calls tools and has no heading, it is the end of the turn before. `at` is the end of the answer before this
        one.
        """
        heading, core = self.template.heading(self.settings)[0], self.template.heading_core(self.settings)
        if i:  # the words of the turn before may contain a text like a heading
            before = self.turns[i - 1].content.strip()
            found = written.find(before, at) if before else -1
            at = max(at, found + len(before)) if found >= 0 else at
        place = written.rfind(core, at) if core else -1
        if place < 0 and "tool_calls" in self.messages[i]:
            return self.template.special_after(written, at) or at
        if place < 0:
            return max(at, len(written.rstrip(" ")))
        same = len(core)
        while same < len(heading) and written[place + same : place + same + 1] == heading[same]:
            same += 1
        return place + same

    def _end(self, i: int, begin: int) -> int | None:
        """The character at which the labels of turn i end; None if it cannot be found.

        Labels end after the turn's end-of-turn token, or after its words if it has no such token. `begin` is the start
        of the answer.
        """
        words = self._words_end(i, begin)
        calls = "tool_calls" in self.messages[i]
        end = self.template.end
        if end and (place := self.text.find(end, words)) >= 0:
            between = self.text[words:place]
            follower = self.turns[i + 1].content.strip() if i + 1 < len(self.turns) else ""
            if (calls and not (follower and follower in between)) or not self.template.has_special(between):
                return place + len(end)
        if calls or words == begin:
            return self._end_by_rendering(i, begin)
        return self.template.special_after(self.text, words) or words

    def _words_end(self, i: int, begin: int) -> int:
        """The position in the text after the words of turn i, searched from `begin`; `begin` if they are not there."""
        content = self.turns[i].content
        for words in (content.strip(), content.rpartition("</think>")[2].strip()):
            if words and (place := self.text.find(words, begin)) >= 0:
                return place + len(words)
        return begin

    def _end_by_rendering(self, i: int, begin: int) -> int | None:
        """The end of turn i, found by rendering the conversation only up to this turn; None if it cannot be found.

        `begin` is the start of the answer.
        """
        try:
            until = self.template.render(self.messages[: i + 1], self.settings)
        except ConversationError:
            return None
        if not self.text.startswith(until) or len(until) <= begin:
            return None
        if self.template.ends_in_special(until[begin:]):
            return begin + len(self.template.up_to_special(until[begin:]))
        return self.template.special_after(self.text, len(until)) or len(until.rstrip())
