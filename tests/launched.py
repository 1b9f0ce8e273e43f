"""Runs the command line in several processes on one machine, as a launcher does, with gloo between them.

The processes are forks of this one, in which everything is imported already.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from offsite.cli import main

LONGEST = 600.0  # seconds until a process that hangs is killed, so that its test fails; gloo itself waits longer


@dataclass(frozen=True)
class Ended:
    """How a process ended; a negative code is the signal that ended it."""

    code: int
    out: str
    err: str


class Launched:
    """Processes that run `offsite`, each with its own words."""

    def __init__(
        self,
        folder: Path,
        words: Sequence[Sequence[object]],
        *,
        changed: Mapping[int, Mapping[str, str]] | None = None,
        before: Callable[[int], None] = lambda rank: None,
    ) -> None:
        """Start one process for each list of words.

        Args:
            folder: a new folder for what they print.
            words: the words of each process.
            changed: variables of the environment that differ from a launcher's, by rank.
            before: called in every process, with its rank, before the command.
        """
        self._folder = folder
        folder.mkdir()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(words))}
        self.processes: list[BaseProcess] = []
        for rank, own in enumerate(words):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(words))}
            environment = {**address, **places, **(changed or {}).get(rank, {})}
            process = multiprocessing.get_context("fork").Process(
                target=_run, args=(folder / str(rank), [str(word) for word in own], environment, rank, before)
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                process.start()
            self.processes.append(process)

    def ended(self) -> list[Ended]:
        """Wait until all have ended."""
        until = time.monotonic() + LONGEST
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        printed = [[(self._folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in self._ranks]
        codes = [process.exitcode for process in self.processes]
        return [Ended(-9 if code is None else code, *texts) for code, texts in zip(codes, printed, strict=True)]

    @property
    def _ranks(self) -> range:
        return range(len(self.processes))


def _run(
    printed: Path, words: list[str], environment: Mapping[str, str], rank: int, before: Callable[[int], None]
) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{printed}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.update({name: value for name, value in environment.items() if value})
    for name in (name for name, value in environment.items() if not value):
        os.environ.pop(name, None)
    code = 70
    try:
        before(rank)
        code = main(words)
    except BaseException:  # noqa: BLE001  it is printed
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
