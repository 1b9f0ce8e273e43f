"""Generates a model's answer to a prompt or a conversation, and passes on its text while it is generated."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offsite.data.conversations.chat_template import ChatTemplate, ConversationError
from offsite.data.whole_encoding import encode_ids
from offsite.errors import DataError, IncompatibleError
from offsite.evaluation.evaluate import load_tuned
from offsite.evaluation.lineage import require_lineage
from offsite.kernels.runtime import Runtime, seeded
from offsite.models.hugging_face_calls import LIBRARY_ERRORS, quiet
from offsite.models.model_folder import Source, folder_of
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.protocol.artifacts import Base, Bundle, PlugIn, Return, files_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

Turn = Mapping[str, str]  # {"role": "user" or "assistant", "content": text}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one (temperature 0), or at random by the model's probabilities."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, its number of tokens, the seconds that it took, and whether the model ended it."""

    text: str
    tokens: int
    seconds: float
    ended: bool  # False if it was cut at the limit of tokens


class Speaker:
    """A loaded language model with its tokenizer, ready to answer.

    Args:
        model: a base, a bundle or a merged plug-in.
        adapter: the adapter on it: a return, or a plug-in saved as an adapter; None: there is none.
        runtime: device and dtype.
        raw: whether texts are continued as they are; if False, the chat template is used where the tokenizer has one.

    Raises:
        IncompatibleError: the adapter is for another model, or the model cannot be loaded.
        OffsiteError: as `offsite.evaluation.evaluate.load_tuned` raises.
    """

    def __init__(
        self,
        model: Path | Base | Bundle | PlugIn,
        adapter: Path | Return | PlugIn | None,
        runtime: Runtime,
        *,
        raw: bool = False,
    ) -> None:
        require_lineage(model, adapter)
        source: Source = files_of(model)
        self._folder = folder_of(source)
        self._tokenizer = load_tokenizer(source)
        self._longest = context_length(source)
        self._model = load_tuned(source, files_of(adapter) if adapter else None, runtime)
        self._ends = _end_tokens(self._tokenizer.eos_token_id, self._model.generation_config)
        self._template = ChatTemplate(self._tokenizer) if self._tokenizer.chat_template and not raw else None

    @property
    def uses_template(self) -> bool:
        """Whether conversations are written by the tokenizer's chat template."""
        return self._template is not None

    def answer(self, turns: Sequence[Turn], sampling: Sampling, on_text: Callable[[str], None]) -> Answer:
        """Generate the answer to a conversation, or without a template the text after that of all turns.

        If the conversation is too long for the model's context, its oldest turns are left out.

        Args:
            turns: the conversation; its last turn is the user's.
            sampling: how tokens are chosen.
            on_text: called with each further piece of the answer's text; it may hold control characters.

        Raises:
            DataError: the last turn alone is too long or empty, or the template refuses the conversation.
            IncompatibleError: the model fails on the tokens.
        """
        from transformers import TextStreamer

        class Pieces(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                on_text(text)

        ids, room = self._prompt_ids(turns, sampling.max_tokens)
        prompt = torch.tensor([ids], device=self._model.device)  # (1, T)
        streamer = Pieces(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        rules = self._config(sampling, room)
        self._model.generation_config = rules  # transformers would add the checkpoint's own rules to ours
        started = time.perf_counter()
        try:
            with quiet(), seeded(sampling.seed, self._model.device), torch.no_grad():
                found = self._model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, generation_config=rules
                )
        except LIBRARY_ERRORS as error:
            raise IncompatibleError(
                f"{self._folder} cannot generate text",
                reasons=[f"{type(error).__name__}: {str(error).strip()[:500]}"],
                next_step="score it with `offsite eval`, which says whether its weights are sound",
            ) from error
        seconds = round(time.perf_counter() - started, 3)
        generated = found[0, len(ids) :].tolist()
        ended = bool(generated) and generated[-1] in self._ends
        text = str(self._tokenizer.decode(generated, skip_special_tokens=True))
        return Answer(text, len(generated) - ended, seconds, ended)

    def _prompt_ids(self, turns: Sequence[Turn], max_tokens: int) -> tuple[list[int], int]:
        """The token ids of a conversation, and the largest number of tokens that the answer may have.

        The oldest turns are left out, a question with its answer at a time, until the rest and a part of the answer
        fit into the context.

        Raises:
            DataError: the last turn alone is too long, or no token is left.
            IncompatibleError: the tokenizer gives ids that the model does not have.
        """
        start = 0
        while True:
            ids = self._encoded(turns[start:])
            room = max_tokens if self._longest is None else min(max_tokens, self._longest - len(ids))
            if room >= min(max_tokens, (self._longest or max_tokens) // 4) or start + 2 >= len(turns):
                break
            start += 2
        if room < 1:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and {self._folder} reads at most {self._longest}, answer included",
                next_step="shorten the prompt",
            )
        if not ids:
            raise DataError("the prompt is empty, and the tokenizer has no token to begin with", next_step="write one")
        known = self._model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise IncompatibleError(
                f"the tokenizer of {self._folder} gives the token {max(ids)}, and the model knows {known}",
                next_step="take the tokenizer that belongs to these weights",
            )
        return ids, room

    def _encoded(self, turns: Sequence[Turn]) -> list[int]:
        """The token ids of a conversation: by the chat template, or the texts as they are, after the BOS token.

        Raises:
            DataError: the template refuses the conversation.
        """
        if self._template is None:
            text = "\n".join(turn["content"] for turn in turns)
            begin = self._tokenizer.bos_token_id
            return [*([] if begin is None else [begin]), *encode_ids(text, self._tokenizer)]
        try:
            text = self._template.render([dict(turn) for turn in turns], asks=True)
        except ConversationError as problem:
            raise DataError(
                f"the chat template of {self._folder} refuses the conversation",
                reasons=[str(problem)],
                next_step="continue the text as it is, without the template: --raw",
            ) from None
        return encode_ids(text, self._tokenizer)

    def _config(self, sampling: Sampling, room: int) -> "GenerationConfig":
        """The rules of the generation; none of the checkpoint's own, which may hold penalties or other limits."""
        from transformers import GenerationConfig

        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        pad = self._tokenizer.pad_token_id
        return GenerationConfig(
            max_new_tokens=room,
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends) if pad is None else pad,
            **chosen,
        )


def _end_tokens(eos: int, config: object) -> set[int]:
    """The ids that end an answer: the tokenizer's end token, and those of the checkpoint's generation config."""
    listed = getattr(config, "eos_token_id", None)
    more = listed if isinstance(listed, list) else [listed]
    return {eos, *(token for token in more if isinstance(token, int) and token >= 0)}
