"""Measures the peak memory during a function call: of the process, or on a CUDA device of torch's allocator."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from offsite.errors import UsageError
from offsite.kernels.runtime import release_freed_memory

_AVAILABLE = Path("/proc/meminfo")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Run `work` and measure the memory in use before and at the peak.

    Returns:
        Bytes in use before the call, and at the peak during the call. On a CUDA device the first counts tensors, the
        second all memory that torch has reserved.

    Raises:
        UsageError: this system cannot report the memory of a process.
    """
    if device.type == "cuda":
        release_freed_memory(device)  # otherwise memory that torch has reserved before would count as of this work
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return before, torch.cuda.max_memory_reserved(device)
    if device.type != "cpu" or not _RESET.exists():
        raise UsageError(
            "memory can be measured where a system says what a process holds: on Linux, or on a CUDA device",
            next_step="in the place of --memory use --gradient-checkpointing, or a lower micro_batch_tokens in "
            "--config; in the place of `--plan measure` use --plan",
        )
    release_freed_memory(device)  # otherwise memory that was freed before would count as memory of this work
    _RESET.write_text("5")  # resets the kernel's record of the peak
    before = _status_bytes("VmRSS")
    work()
    return before, _status_bytes("VmHWM")


def available_memory(device: torch.device) -> int | None:
    """The bytes of memory that a program may still use on a device; None if this system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _AVAILABLE.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+)", _AVAILABLE.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _status_bytes(key: str) -> int:
    """A value of /proc/self/status in bytes, such as "VmHWM", the peak resident memory (the file has it in kB)."""
    found = re.search(rf"^{key}:\s+(\d+)", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
