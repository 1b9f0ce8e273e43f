"""How many threads compute, and how they wait for one another. Imports no torch: its OpenMP runtime reads this once."""

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

_LOAD = Path("/proc/loadavg")
_LOOKS, _APART = 5, 0.004  # seconds
_SPINS = "10000"  # some ten microseconds


def available_cores() -> int:
    """Cores that this process may use: a container's share, not the machine's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usual_threads() -> int:
    """Threads that compute unless a setting says otherwise: $OMP_NUM_THREADS, else every core of this process.

    Of a list (one number for each level of nesting) the first counts; what is no number above 0 does not.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(said) if said.isascii() and said.isdecimal() else 0) or available_cores()


def settle_waiting(environment: MutableMapping[str, str], load: Path = _LOAD) -> None:
    """Have waiting threads sleep, on an idle machine after a short spin; what the environment says already stays.

    A step of a small model is thousands of products of some ten microseconds. Waking a sleeping thread takes as long
    as one of them, while a thread that spins beside other work takes the core that the other threads wait for
    (benchmarks/NOTES.md has both).

    Args:
        environment: that torch is going to be loaded in.
        load: the kernel's file of load averages; a system without one counts as busy.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        return
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    if _busy_cores(load) + available_cores() <= (os.cpu_count() or 1):
        environment["GOMP_SPINCOUNT"] = _SPINS


def _busy_cores(load: Path) -> float:
    """Cores that others compute on now: the least of a few looks, as whatever comes and goes is no obstacle."""
    found = []
    for look in range(_LOOKS):
        time.sleep(_APART if look else 0)
        try:
            running, _, _ = load.read_text(encoding="ascii").split()[3].partition("/")
            found.append(int(running) - 1)  # we are one
        except (OSError, ValueError, IndexError):
            return float("inf")
    return min(found)
