"""Settings of the C allocator and of oneDNN's caches, for tensors that are allocated in every step."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import MutableMapping

from offsite.kernels.replacement_report import Piece

# oneDNN compiles a kernel for each shape of matrix product and caches it; torch's bridge to it (ideep) caches the same
# kernels once more. By default each cache holds a thousand: sequences of many lengths would fill hundreds of megabytes.
# One pass needs thirty to fifty; with a smaller cache it compiles them again in every block. A second copy has no use.
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "48", "LRU_CACHE_CAPACITY": "1"}


def bound_caches(environment: MutableMapping[str, str]) -> None:
    """Limit the size of oneDNN's caches through variables in `environment`, unless they are already set."""
    for cache, capacity in _CACHES.items():
        environment.setdefault(cache, capacity)


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next step, where it would normally return it to the system.

    Memory that is returned causes a page fault for every page when it is allocated again. Activations and logits are
    tensors of many megabytes, allocated and freed in every step: without this setting, a step of a small model spends a
    third of its time on page faults. The price is a fragmented heap, about a third more memory at the peak
    (docs/memory.md), and nothing is returned to the system unless `release_freed_memory` is called.

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
        library.mallopt(m_arena_max, 1)  # otherwise only the thread that freed memory could use it again
        return True
    return False


def report() -> Piece:
    """The entry for the report of the kernels: whether the allocator keeps freed memory, and the reason if not."""
    kept = keep_freed_memory()
    return Piece(
        "freed memory kept", int(kept), "glibc keeps it for the next step" if kept else "this C library cannot"
    )


def release_freed_memory() -> None:
    """Return all freed memory in glibc's heap to the system, so that the process holds only the memory that it uses."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
            ctypes.CDLL(None).malloc_trim(0)
