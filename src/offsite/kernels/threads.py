"""The number of CPU threads. Torch-free."""

import os


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
