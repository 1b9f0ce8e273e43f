"""The tokenizer and chat template of a stranger's bundle, in a process of their own with limits of memory and time.

A template is a program, and a tokenizer's rules and expressions are nearly one: a hostile one may loop for ever or ask
for all memory. So the process that holds the rows and the model sends parts of the rows to a worker, and gets token
ids back. The worker is started as a command of its own, as those for pictures are (`picture_workers`); it forks for
each tokenizer, so that it imports its libraries once.
"""

import atexit
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offsite.data.encoded_part import EncodedPart, read_choices, read_token_id, row_message
from offsite.data.examples import Choices
from offsite.data.row import Row
from offsite.data.worker_messages import receive, send
from offsite.errors import DataError, IncompatibleError, OffsiteError, StorageError, UsageError, VerificationError
from offsite.models.model_folder import Source, as_folder, folder_of

MEMORY_BYTES = 4 * 2**30  # that loading, rendering and encoding may take in the worker
_SECONDS, _CHARACTERS_PER_SECOND = 60.0, 20_000  # for an answer; real tokenizers need a hundredth of this
_START_SECONDS = 300.0  # for the worker's imports, on a slow disk
_MODULE = "offsite.data.serve_tokenizer"
_KINDS = {kind.__name__: kind for kind in (DataError, UsageError, IncompatibleError, StorageError, VerificationError)}
_ADVICE = "ask the model's owner for another bundle, and send this message along"


@contextlib.contextmanager
def confined_tokenizer(source: Source) -> Iterator["ConfinedTokenizer"]:
    """Context manager: open the tokenizer of an artifact or a folder in a process of its own.

    Raises:
        UsageError: a package that reads the tokenizer's file is not installed.
        IncompatibleError: the tokenizer does not load, or not within the limits.
        StorageError: the files cannot be written to a temporary folder.
    """
    worker = _take_worker()
    try:
        with as_folder(source) as folder:
            opened = worker.ask({"do": "open", "folder": str(folder.absolute()), "named": str(folder_of(source))}, 0)[0]
        yield ConfinedTokenizer(worker, folder_of(source), opened)
    finally:
        worker.release()


class ConfinedTokenizer:
    """A tokenizer in a worker process: it encodes rows, and decodes token ids.

    Args:
        worker: the process, which has opened the tokenizer.
        folder: the folder of the artifact, for messages.
        opened: the worker's answer: whether there is a chat template, and the id of the end token.
    """

    def __init__(self, worker: "_Worker", folder: Path, opened: Mapping[str, Any]) -> None:
        self._worker, self._folder = worker, folder
        with self._malformed_answers():
            self.eos_token_id = read_token_id(opened["eos_token_id"])

    def encode_part(self, rows: Sequence[Row], name: str, max_length: int, *, skip_long: bool) -> EncodedPart:
        """Encode some rows; arguments and errors as for `offsite.data.tokens.RowEncoder.encode`.

        Raises:
            IncompatibleError: the template or the tokenizer is over the limits of time or memory, or fails.
        """
        facts, content = self._ask("encode", rows, name=name, max_length=max_length, skip_long=skip_long)
        with self._malformed_answers():
            return EncodedPart.from_message(facts, content)

    def choices_part(
        self, rows: Sequence[Row], name: str, max_length: int, *, skip_long: bool
    ) -> tuple[list[Choices], list[str]]:
        """Encode some multiple-choice rows, as `offsite.data.tokens.choices_part` does; raises as `encode_part`."""
        facts, content = self._ask("choices", rows, name=name, max_length=max_length, skip_long=skip_long)
        with self._malformed_answers():
            return read_choices(facts, content)

    def prompt_ids(self, row: Row) -> list[int]:
        """The token ids that a model reads before it answers a row; raises as `encode_part`."""
        facts, _ = self._ask("prompt", [row])
        with self._malformed_answers():
            return [read_token_id(one) for one in facts["ids"]]

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of token ids; arguments as in transformers. Raises as `encode_part`."""
        settings = {"skip": skip_special_tokens, "clean": clean_up_tokenization_spaces}
        facts, _ = self._ask("decode", [], ids=[int(one) for one in ids], **settings)
        with self._malformed_answers():
            return str(facts["text"])

    def _ask(self, what: str, rows: Sequence[Row], **settings: Any) -> tuple[dict[str, Any], bytes]:
        size = sum(map(characters, rows))
        return self._worker.ask({"do": what, "rows": [row_message(row) for row in rows], **settings}, size)

    @contextlib.contextmanager
    def _malformed_answers(self) -> Iterator[None]:
        """Context manager: an answer that is malformed is an error about the bundle."""
        try:
            yield
        except (ValueError, TypeError, KeyError) as error:
            raise IncompatibleError(
                f"the tokenizer of {self._folder} gives no token ids", reasons=[str(error)[:200]], next_step=_ADVICE
            ) from None


def characters(row: Row) -> int:
    """The number of characters of a row, by which parts of a data set and time limits are measured."""
    turns = sum(len(turn.content) + len(str(turn.more)) for turn in row.turns)
    return len(row.prompt or "") + len(row.completion) + sum(map(len, row.choices)) + turns


class _Worker:
    """A worker process, as this process uses it. One thread at a time may use it."""

    def __init__(self) -> None:
        places = os.pathsep.join(place for place in sys.path if place)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a template or a library prints there may be hostile
            start_new_session=True,  # so that the process and its fork are killed together, and Ctrl-C reaches neither
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._fresh = True

    def ask(self, facts: Mapping[str, Any], size: int) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer; `size` is the number of characters in it.

        Raises:
            OffsiteError: the worker's own error; or IncompatibleError if it did not answer in time, or ended.
        """
        seconds = _SECONDS + size / _CHARACTERS_PER_SECOND + (_START_SECONDS if self._fresh else 0)
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            send(self._process.stdin, {**facts, "seconds": math.ceil(seconds) + 1})
            answer, content = receive(self._process.stdout, most=64 * size + 2**26)
        except (OSError, EOFError, ValueError):
            self.kill()
            raise _over_limits(late=late.is_set(), seconds=seconds) from None
        except BaseException:  # Ctrl-C: the answer to this request must not be taken for that to another
            self.kill()
            raise
        finally:
            timer.cancel()
        self._fresh = False
        if "error" in answer:
            raise _error_of(answer["error"])
        return answer, content

    def release(self) -> None:
        """Close the tokenizer, and keep the process for the next one if it still answers."""
        if self._process.poll() is None and not self._fresh:
            with contextlib.suppress(OffsiteError):
                self.ask({"do": "close"}, 0)
                with _lock:
                    _idle.append(self)
                return
        self.kill()

    @property
    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process and its fork at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # the last request may not have reached the process
                if pipe is not None:
                    pipe.close()


_idle: list[_Worker] = []
_lock = threading.Lock()


def _take_worker() -> _Worker:
    """A worker process that is free, or a new one."""
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.runs:
                return worker
    return _Worker()


@atexit.register
def _end_idle() -> None:
    """End the worker processes that wait for a tokenizer; if this process is killed, they end as their pipes close."""
    while _idle:
        _idle.pop().kill()


def _over_limits(*, late: bool, seconds: float) -> IncompatibleError:
    """The error for a worker that did not answer, because it was killed after some seconds (`late`) or ended."""
    why = f"it took over {seconds:.0f} s" if late else f"it failed, or needed over {MEMORY_BYTES // 2**30} GiB"
    return IncompatibleError(
        "the bundle's tokenizer or chat template is over its limits", reasons=[why], next_step=_ADVICE
    )


def _error_of(error: object) -> OffsiteError:
    """The error that a worker reported."""
    said = error if isinstance(error, dict) else {}
    reasons = [str(one)[:2000] for one in said.get("reasons") or () if isinstance(one, str)]
    next_step = said.get("next_step")
    kind = _KINDS.get(str(said.get("kind")), IncompatibleError)
    return kind(
        str(said.get("what"))[:2000], reasons=reasons, next_step=next_step if isinstance(next_step, str) else _ADVICE
    )
