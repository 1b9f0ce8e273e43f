"""The worker process of `confined_tokenizer`: opens a tokenizer with limits on memory, and answers requests.

It forks for each tokenizer. The fork lowers its limits for good, loads the tokenizer, and ends when it is closed; so no
tokenizer meets what another one has left.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from offsite.data.confined_tokenizer import MEMORY_BYTES
from offsite.data.encoded_part import choices_message, read_row
from offsite.data.tokens import RowEncoder, choices_part, encode_prompt
from offsite.data.worker_messages import receive, send
from offsite.errors import IncompatibleError, OffsiteError
from offsite.models.tokenizers import load_tokenizer

Answer = tuple[Mapping[str, Any], bytes]


def main() -> None:
    """Answer requests until the pipe closes: "open" with a folder, then requests about its tokenizer, then "close"."""
    for one in (signal.SIGINT, signal.SIGTERM):  # the process that started this one decides when it ends
        signal.signal(one, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    _import_libraries()
    if not hasattr(os, "fork"):
        while True:
            _serve(sys.stdin.buffer, answers)
    while True:
        child = os.fork()
        if not child:
            with contextlib.suppress(EOFError, OSError):
                _lower_limits()
                _serve(os.fdopen(0, "rb"), answers)  # a buffer of its own: the process that forks reads nothing
                os._exit(0)
            os._exit(1)
        if os.waitpid(child, 0)[1]:  # it was killed, crashed, or the pipe closed
            return


def _serve(asked: BinaryIO | Any, answers: BinaryIO | Any) -> None:
    """Answer requests about one tokenizer until it is closed.

    Raises:
        EOFError: the pipe was closed.
    """
    work: _Open | None = None
    while True:
        facts, _ = receive(asked)
        if facts["do"] == "close":
            send(answers, {})  # the next request may come only now, as what is in the buffer ends with the fork
            return
        _end_after(facts["seconds"])
        try:
            if facts["do"] == "open":
                work = _Open(Path(facts["folder"]), Path(facts["named"]))
                answer: Answer = {"eos_token_id": work.tokenizer.eos_token_id}, b""
            else:
                assert work is not None
                answer = work.answers[facts["do"]](facts)
        except OffsiteError as error:
            answer = {"error": _described(error)}, b""
        except MemoryError:
            answer = {"error": _described(_failed(f"it needs over {MEMORY_BYTES // 2**30} GiB"))}, b""
        except BaseException as error:  # noqa: BLE001  of a hostile tokenizer; panics of Rust are no Exception
            answer = {"error": _described(_failed(f"{type(error).__name__}: {str(error)[:300]}"))}, b""
        _end_after(0)
        send(answers, *answer)


class _Open:
    """An opened tokenizer, and how it answers each request.

    Args:
        folder: where its files are.
        named: the folder of the artifact that they come from, for messages.
    """

    def __init__(self, folder: Path, named: Path) -> None:
        try:
            self.tokenizer = load_tokenizer(folder)
        except OffsiteError as error:
            reasons = [reason.replace(str(folder), str(named)) for reason in error.reasons]
            what = error.what.replace(str(folder), str(named))
            raise type(error)(what, reasons=reasons, next_step=error.next_step) from None
        self._encoder = RowEncoder(self.tokenizer)
        self.answers: Mapping[str, Callable[[Mapping[str, Any]], Answer]] = {
            "encode": self._encode,
            "choices": self._choices,
            "prompt": self._prompt,
            "decode": self._decode,
        }

    def _encode(self, asked: Mapping[str, Any]) -> Answer:
        rows = [read_row(one) for one in asked["rows"]]
        return self._encoder.encode(rows, asked["name"], asked["max_length"], skip_long=asked["skip_long"]).message()

    def _choices(self, asked: Mapping[str, Any]) -> Answer:
        rows = [read_row(one) for one in asked["rows"]]
        name, longest, skip = asked["name"], asked["max_length"], asked["skip_long"]
        return choices_message(*choices_part(rows, self.tokenizer, name, longest, skip_long=skip))

    def _prompt(self, asked: Mapping[str, Any]) -> Answer:
        return {"ids": list(map(int, encode_prompt(read_row(asked["rows"][0]), self.tokenizer)))}, b""

    def _decode(self, asked: Mapping[str, Any]) -> Answer:
        settings = {"skip_special_tokens": asked["skip"], "clean_up_tokenization_spaces": asked["clean"]}
        return {"text": str(self.tokenizer.decode(asked["ids"], **settings))}, b""


def _end_after(seconds: int) -> None:
    """Have the system end this process after some seconds, even if nobody waits for the answer any more; 0: never."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _lower_limits() -> None:
    """Limit the memory of this process, the files that it writes, and its core dumps, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])  # libraries are mapped already
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _import_libraries() -> None:
    """Import before the first fork what every tokenizer needs; nothing of them may run here, nor start a thread.

    torch counts as not installed: no tokenizer needs it, and importing it would take most of the time.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    with contextlib.suppress(ImportError):  # the error comes when a tokenizer is opened
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


def _failed(why: str) -> IncompatibleError:
    return IncompatibleError(
        "the bundle's tokenizer or chat template fails",
        reasons=[why],
        next_step="ask the model's owner for another bundle, and send this message along",
    )


def _described(error: OffsiteError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__, "what": error.what, "reasons": list(error.reasons), "next_step": error.next_step
    }  # fmt: skip


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    with contextlib.suppress(BrokenPipeError):
        main()
