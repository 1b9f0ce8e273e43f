"""The commands generate and chat, which show what models answer, one below the other, while they answer."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offsite.cli import flags, terminal, verified_models

if TYPE_CHECKING:
    from offsite.evaluation.answer_stream import Answer, Sampling, Speaker, Turn

_TAB = "    "
_RESET, _LEAVE = "/reset", "/exit"
_Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL...", help="bases, bundles, plug-ins; an adapter is put on the model before it"),
]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="longest answer in tokens")]
_Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0.0, max=10.0, help="0: the most likely token; above: random")
]
_Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**63 - 1, help="seed of random tokens")]
_Raw = Annotated[bool, typer.Option("--raw", help="continue the text as it is, without the chat template")]


def generate(
    context: typer.Context,
    models: _Models,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="the text to answer")],
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    raw: _Raw = False,
    home: flags.HomeFlag = None,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Let models answer a prompt, one after the other: for instance base, emulator and plug-in.

    Bundles and plug-ins are verified first. The prompt is written by the model's chat template, where it has one; with
    --raw the model continues it as it stands, as after tuning on rows of prompt and completion. Control characters of
    an answer are printed as escapes. Device and dtype are those of table [eval] in --config.

    Example:
      offsite generate base/ plugged/ --prompt "Which river flows through Rome?"
    """
    _require_text(prompt)
    sampling = _sampling(max_tokens, temperature, seed)
    turns = [{"role": "user", "content": prompt}]
    answers = []
    for name, one in _speakers(models, context, home, config, raw=raw):
        answers.append(_facts(name, one, _answer(name, one, turns, sampling, shown=not as_json)))
        del one  # so that one model at a time is in memory
    if as_json:
        terminal.show({"prompt": prompt, "answers": answers}, as_json=True)


def chat(
    context: typer.Context,
    models: _Models,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    raw: _Raw = False,
    home: flags.HomeFlag = None,
    config: flags.ConfigFlag = None,
    as_json: flags.JsonFlag = False,
) -> None:
    """Talk to models in the terminal; each has its own conversation, and all get what you write.

    A line is one message; /reset begins a new conversation, /exit or the end of the input ends it. With --json there is
    a line of JSON for each message. Otherwise as `offsite generate`.

    Example:
      offsite chat base/ bundle/ plugged/
    """
    from offsite.errors import DataError

    sampling = _sampling(max_tokens, temperature, seed)
    speakers = list(_speakers(models, context, home, config, raw=raw))
    conversations: list[list[Turn]] = [[] for _ in speakers]
    terminal.hint(f"write a message; {_RESET} begins a new conversation, {_LEAVE} ends it")
    for message in _messages():
        if message == _RESET:
            conversations = [[] for _ in speakers]
            continue
        answers = []
        for (name, one), turns in zip(speakers, conversations, strict=True):
            turns.append({"role": "user", "content": message})
            try:
                answer = _answer(name, one, turns, sampling, shown=not as_json)
            except DataError as error:  # a message that is too long: the conversation goes on without it
                if as_json:
                    raise
                terminal.show_error(error, as_json=False)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": answer.text})
            answers.append(_facts(name, one, answer))
        if as_json:
            typer.echo(json.dumps({"prompt": message, "answers": answers}))


def _sampling(max_tokens: int, temperature: float, seed: int) -> "Sampling":
    from offsite.evaluation.answer_stream import Sampling

    return Sampling(max_tokens, temperature, seed)


def _speakers(
    models: Sequence[Path], context: typer.Context, home: Path | None, config: Path | None, *, raw: bool
) -> "Iterator[tuple[str, Speaker]]":
    """Verify all models of the command line, then load one after the other; yields each with its name.

    Raises:
        UsageError: one of them is an image model, or as `verify_models` raises.
    """
    from offsite.config import EvalSpec
    from offsite.errors import UsageError

    runtime = flags.settings(EvalSpec, config, {}).runtime
    named = verified_models.verify_models(models, flags.home_of(context, home))
    from offsite.evaluation.answer_stream import Speaker
    from offsite.kernels.runtime import resolve_runtime
    from offsite.models.image_encoder import sees_images
    from offsite.models.model_folder import model_settings
    from offsite.progress import Event
    from offsite.protocol.artifacts import files_of

    if images := [one.name for one in named if sees_images(model_settings(files_of(one.model)))]:
        raise UsageError(
            f"{' and '.join(images)} sees images and writes nothing", next_step="name language models alone"
        )
    chosen = resolve_runtime(runtime.device, runtime.compute, runtime.threads)
    for number, one in enumerate(named, start=1):
        with terminal.showing_progress() as progress:
            progress(Event("loading", number - 1, len(named), {"model": one.name}))
            speaker = Speaker(one.model, one.adapter, chosen, raw=raw)
            progress(Event("loading", number, len(named), {"model": one.name}))
        yield one.name, speaker
        del speaker  # the caller decides how long it stays


def _answer(name: str, speaker: "Speaker", turns: "Sequence[Turn]", sampling: "Sampling", *, shown: bool) -> "Answer":
    """Let one model answer; with `shown` its name and its text are printed while it answers."""
    if not shown:
        return speaker.answer(turns, sampling, lambda text: None)
    typer.echo(terminal.printable(f"── {name}"))
    answer = speaker.answer(turns, sampling, _write)
    cut = "" if answer.ended else " [...]"
    typer.echo(f"{cut}\n")
    return answer


def _write(text: str) -> None:
    """Print a piece of a model's text at once; tabs become spaces, other control characters but line ends escapes."""
    typer.echo(terminal.printable(text.replace("\t", _TAB)), nl=False)
    sys.stdout.flush()


def _facts(name: str, speaker: "Speaker", answer: "Answer") -> dict[str, Any]:
    """A model's answer as values that JSON can hold."""
    return {"model": name, "chat_template": speaker.uses_template, **asdict(answer)}


def _messages() -> Iterator[str]:
    """Yield the messages that the user writes, without empty ones, until /exit or the end of the input.

    Raises:
        UsageError: a line is not text.
    """
    from offsite.errors import UsageError

    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  lets `input` edit lines and remember them
        prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UsageError("the input is no text", reasons=[str(error)], next_step="write UTF-8") from None
        if line == _LEAVE:
            return
        if line:
            _require_text(line)
            yield line


def _require_text(text: str) -> None:
    """Refuse a text with bytes that are not UTF-8, which Python keeps as lone surrogates.

    Raises:
        UsageError: it holds some.
    """
    from offsite.errors import UsageError

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8", reasons=[str(error)[:200]], next_step="write UTF-8") from None
