"""Settings of the C allocator and of oneDNN's caches, for tensors that are allocated anew in every step."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import MutableMapping

from offsite.kernels.replacement_report import Piece

# Products of each shape that oneDNN keeps compiled, and torch's bridge to it (ideep) in a cache of its own. By default
# each keeps a thousand: rows of many lengths would fill hundreds of megabytes. One pass needs thirty to fifty, and with
# fewer compiles them anew in every block; ideep's are the same ones again, which only kept makes them larger.
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "48", "LRU_CACHE_CAPACITY": "1"}


def bound_caches(environment: MutableMapping[str, str]) -> None:
    """Limit the size of oneDNN's caches, unless the environment already sets it."""
    for cache, capacity in _CACHES.items():
        environment.setdefault(cache, capacity)


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next step, where it would return it and fault every page in anew.

    Activations and logits come and go in pieces of many megabytes: without this a step of a small model spends a third
    of its time on page faults. It costs holes between the pieces, about a third more at the peak (docs/memory.md), and
    nothing is returned unless `release_freed_memory` is called.

    Returns:
        Whether this C library has the setting.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such switch
        library = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
        library.mallopt(m_mmap_threshold, 2**30)
        library.mallopt(m_trim_threshold, 2**31 - 1)
        library.mallopt(m_arena_max, 1)  # else each thread would keep what it freed to itself
        return True
    return False


def report() -> Piece:
    """Whether the allocator keeps freed memory, and the reason if not."""
    kept = keep_freed_memory()
    return Piece(
        "freed memory kept", int(kept), "glibc keeps it for the next step" if kept else "this C library cannot"
    )


def release_freed_memory() -> None:
    """Return to the system what glibc's heap keeps of freed memory, so that what a process holds is what it needs."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
            ctypes.CDLL(None).malloc_trim(0)
