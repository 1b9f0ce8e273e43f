"""Reads from the environment which process of a run this one is, as `torchrun` and `accelerate launch` say it.

Torch-free, so that a wrong environment is reported at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from offsite.errors import UsageError

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where the processes find each other


@dataclass(frozen=True)
class Place:
    """The place of this process among the processes that a launcher started."""

    rank: int = 0  # its number, from 0
    count: int = 1  # number of all processes
    local_rank: int = 0  # its number on this machine, from 0: the number of its device
    local_count: int = 1  # number of processes on this machine


def read_place(environment: Mapping[str, str]) -> Place:
    """The place of this process; without a launcher it is the only one.

    Args:
        environment: the environment variables of this process. RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are
            read; if there are several processes, MASTER_ADDR and MASTER_PORT must be set too.

    Raises:
        UsageError: the variables contradict each other; the error lists every contradiction.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place()
    problems: list[str] = []

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is not None and text.isascii() and text.isdigit():
            return int(text)
        if text is not None or default is None:
            problems.append(f"{name} is not set" if text is None else f"{name} is {text!r}, not a number")
        return default or 0

    rank, count = number("RANK"), number("WORLD_SIZE")
    several = not problems and count > 1
    local_count = number("LOCAL_WORLD_SIZE", count)
    local_rank = number("LOCAL_RANK", None if several else 0)
    problems += [f"{name} is not set" for name in _ADDRESS if several and not environment.get(name)]
    if not problems:
        if rank >= max(count, 1) or not count:
            problems.append(f"RANK is {rank}, and WORLD_SIZE is {count}: ranks are 0 to WORLD_SIZE - 1")
        if local_rank >= max(local_count, 1):
            problems.append(f"LOCAL_RANK is {local_rank}, and LOCAL_WORLD_SIZE is {local_count}")
        if local_count > count:
            problems.append(f"LOCAL_WORLD_SIZE is {local_count}, and WORLD_SIZE is {count}")
    if problems:
        raise UsageError(
            "the environment does not say which of several processes this one is",
            reasons=problems,
            next_step="start all processes with `torchrun --nproc-per-node N -m offsite tune`, or unset RANK and "
            "WORLD_SIZE for a run in one process",
        )
    return Place(rank, count, local_rank, local_count)
