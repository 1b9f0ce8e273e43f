"""Worker processes that decode and crop pictures while the main process runs the network.

A worker is started as a command of its own and answers over pipes. So it does not run the caller's program again (as
`multiprocessing` would), and nothing is pickled. It ends when its pipe closes, also if the main process is killed. The
pixels do not depend on which worker decodes them: a random crop depends only on its key.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from offsite.data.pictures.picture_files import Picture, Pixels, look
from offsite.data.worker_messages import receive, send
from offsite.errors import DataError, OffsiteError

_THREADS = 4  # number of threads if there are no worker processes; Pillow and NumPy release the interpreter's lock
_MODULE = "offsite.data.pictures.picture_workers"
_FEW = "lower the setting workers; 0 decodes in the process that tunes"

A = TypeVar("A")
R = TypeVar("R")


class PictureWorkers:
    """Context manager: a pool of worker processes; each starts when it is first needed, and all end with the body.

    Args:
        count: the number of processes; with 0, threads of this process do the work.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(max_workers=count or _THREADS, thread_name_prefix="pictures")
        self._mine = threading.local()  # the worker process of each thread
        self._lock, self._closed = threading.Lock(), False
        self._started: list[_Served] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every process, and cancel the work that has not started."""
        with self._lock:
            self._closed = True
        for served in self._started:
            served.end()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[A], R], given: A) -> Future[R]:
        """Run `work(given)` in a thread of the pool; `work` may call the method `look`."""
        return self._pool.submit(work, given)

    def in_order(self, work: Callable[[A], R], given: Iterable[A]) -> Iterator[R]:
        """Run `work` on every item in several threads, and yield the results in the order of the items.

        Only about two items per worker are submitted in advance, so few results are in memory at once.
        """
        waiting: deque[Future[R]] = deque()
        for one in given:
            waiting.append(self.submit(work, one))
            if len(waiting) > 2 * (self.count or _THREADS):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def look(self, picture: Picture, crop: tuple[int, int] | None = None, key: Sequence[int] = ()) -> Pixels:
        """Decode and crop a picture, in the worker process of the calling thread if there are workers.

        Arguments as for `offsite.data.pictures.picture_files.look`.

        Raises:
            DataError: the picture is broken or too large, or its format is not supported.
            OffsiteError: the worker process ended, or the pool was closed.
        """
        if not self.count:
            return look(picture, crop, key)
        if not hasattr(self._mine, "served"):
            with self._lock:
                if self._closed:
                    raise OffsiteError("decoding was stopped")
                self._mine.served = _Served()
                self._started.append(self._mine.served)
        served: _Served = self._mine.served
        return served.look(picture, crop, key)


class _Served:
    """A worker process, as the main process uses it; only one thread may use it."""

    def __init__(self) -> None:
        places = os.pathsep.join(place for place in sys.path if place)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def look(self, picture: Picture, crop: tuple[int, int] | None, key: Sequence[int]) -> Pixels:
        """Let the worker decode and crop a picture, and wait for the result.

        Arguments as for `offsite.data.pictures.picture_files.look`.

        Raises:
            DataError: the picture cannot be used.
            OffsiteError: the worker process ended.
        """
        source = picture.source
        content = source if isinstance(source, bytes) else b""
        wanted = {"name": picture.name, "path": None if isinstance(source, bytes) else str(source.absolute())}
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            send(to, {**wanted, "crop": crop, "key": list(key)}, content)
            answer, made = receive(back)
        except (OSError, EOFError, ValueError):  # ValueError: the pipe was closed by this process
            raise OffsiteError(
                f"a process that decodes pictures ended while it looked at {picture.name}",
                reasons=[f"its exit code is {self._process.poll()}; a negative one is a signal"],
                next_step=_FEW,
            ) from None
        if "what" in answer:
            raise DataError(answer["what"], reasons=answer["reasons"])
        pixels: Pixels = np.frombuffer(made, dtype=np.uint8).reshape(answer["shape"])
        return pixels

    def end(self) -> None:
        """Kill the process at once, even if it is working."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # the last request may not have reached the process
                if pipe is not None:
                    pipe.close()


def _serve() -> None:
    """The worker's main loop: answer requests until the pipe closes.

    Texts that libraries print go to standard error, since standard output is the pipe.
    """
    for one in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a group; the main process decides what ends
        signal.signal(one, signal.SIG_IGN)
    wanted, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            asked, content = receive(wanted)
        except EOFError:
            return
        picture = Picture(asked["name"], content if asked["path"] is None else Path(asked["path"]), None)
        try:
            pixels = look(picture, asked["crop"], asked["key"])
        except DataError as error:
            send(answers, {"what": error.what, "reasons": error.reasons}, b"")
        else:
            send(answers, {"shape": pixels.shape}, pixels.tobytes())


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        _serve()
