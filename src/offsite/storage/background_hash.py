"""Hashes chunks in another thread, so that the caller reads, checks or writes in the meantime. Torch-free."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_LARGE = 2**18  # bytes; a smaller chunk is hashed at once, which takes less time than handing it over


class BackgroundHash:
    """Context manager that passes chunks to a hash in the order in which it gets them.

    Args:
        update: the method `update` of a hash.
    """

    def __init__(self, update: Callable[[bytes | bytearray | memoryview], object]) -> None:
        self._update = update
        self._worker: ThreadPoolExecutor | None = None
        self._running: Future[object] | None = None

    def __enter__(self) -> "BackgroundHash":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()

    def add(self, chunk: bytes | bytearray | memoryview) -> None:
        """Hash a chunk, whose content must not change until the next call of `add` or `wait` has returned."""
        self.wait()
        if len(chunk) < _LARGE:
            self._update(chunk)
            return
        self._worker = self._worker or ThreadPoolExecutor(1, "offsite-hash")
        self._running = self._worker.submit(self._update, chunk)

    def wait(self) -> None:
        """Return when all chunks are hashed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
