"""Chooses the number of CPU threads. Torch-free."""

import os


def available_cores() -> int:
    """The number of cores that this process may use (its CPU affinity), which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usual_threads() -> int:
    """The default number of threads: $OMP_NUM_THREADS, or if it is not set every core that this process may use.

    If the variable is a list (one number for each level of nesting), the first number counts. A value that is not a
    positive integer is ignored.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(said) if said.isascii() and said.isdecimal() else 0) or available_cores()
