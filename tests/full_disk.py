"""A disk that fills up: os.write, through which all files of the package go, refuses after some calls."""

import errno
import os
from typing import Any

import pytest


class Disk:
    """Counts the writes to files.

    Attributes:
        calls: how many there were.
        room: how many succeed; None for all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr(os, "write", self._counted)

    def _counted(self, descriptor: int, content: Any) -> int:
        self.calls += 1
        if self.room is not None and self.calls > self.room:
            self._write(descriptor, memoryview(content)[: len(content) // 2])  # a part still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, content)
