"""Chooses device, compute dtype, number of threads and random seed for a stage that runs a network."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from offsite.errors import UsageError
from offsite.kernels.cpu import allocator
from offsite.kernels.cpu.cpu_features import made_by_intel
from offsite.kernels.threads import available_cores, usual_threads

_MOST_WORKERS = 8  # the largest number that is started by default


@dataclass(frozen=True)
class Runtime:
    """A device, and the dtype of the frozen weights and activations on it."""

    device: torch.device
    dtype: torch.dtype


def resolve_runtime(
    device: str = "auto",
    compute: Literal["auto", "bf16", "fp32"] = "auto",
    threads: int | None = None,
    *,
    process: int | None = None,
) -> Runtime:
    """Choose the device and the compute dtype from the settings, and set the number of CPU threads.

    Args:
        device: "auto" is the first CUDA device, else XPU, else the CPU; MPS is used only if the setting names it.
        compute: "auto" is bf16 if the hardware multiplies bf16 matrices faster than fp32, else fp32. This depends on
            the kind of hardware and never on a measurement, so the same machine always makes the same choice.
        threads: the number of CPU threads; None means $OMP_NUM_THREADS, else every core that this process may use.
        process: the number of this process among several on this machine, from 0: each has the device of its number.
            None: there is only one process.

    Raises:
        UsageError: this machine does not have the device in the settings, or not one for every process.
    """
    torch.set_num_threads(threads or usual_threads())
    resolved = _resolve_device(device)
    if process is not None:
        resolved = _device_of_process(resolved, process)
    if resolved.type == "cpu":
        allocator.keep_freed_memory()
        allocator.bound_caches(os.environ)
    fast = compute == "bf16" or (compute == "auto" and bf16_support(resolved)[0])
    return Runtime(resolved, torch.bfloat16 if fast else torch.float32)


def worker_count(wanted: int | None, device: torch.device, processes: int = 1) -> int:
    """The number of processes that decode pictures: the setting, or if it is None the best number for the device.

    On a CPU the best number is 0: the network would lose as much CPU time to the workers as they save (docs/images.md).
    Several `processes` of one run share the cores of this machine.
    """
    if wanted is not None:
        return wanted
    return 0 if device.type == "cpu" else max(0, min(_MOST_WORKERS, available_cores() // processes - 1))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context manager: runs the body of the `with` statement under a seed, then restores the caller's random state."""
    with keep_random_state(device):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Context manager: afterwards the random states of the CPU and of the device are as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def usual_tokens_at_once(runtime: Runtime, *, text: bool) -> int:
    """The default number of padded tokens, or patches of pictures, that run at once.

    On a CPU 1024, but 512 for text in fp32, whose activations then stay in its caches. A CUDA device or XPU is only
    busy with more: 1024 for every 16 GiB of its memory, rounded down to a power of two, in fp32 half of that. This
    depends on the kind of hardware and never on a measurement.
    """
    device, wide = runtime.device, runtime.dtype.itemsize == 4
    if device.type not in ("cuda", "xpu"):
        return 512 if wide and text else 1024
    memory: int = torch.get_device_module(device).get_device_properties(device).total_memory
    shares = max(1, round(memory / 2**30) // 16)
    return (512 if wide else 1024) << (shares.bit_length() - 1)


def release_freed_memory(device: torch.device) -> None:
    """Return freed memory that the device's allocator keeps to the system, so that a measurement does not count it."""
    if device.type == "cpu":
        allocator.release_freed_memory()
    elif device.type == "cuda":
        torch.cuda.empty_cache()


def _resolve_device(name: str) -> torch.device:
    """The device of the setting `device`.

    Raises:
        UsageError: this machine does not have it.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "xpu", "cpu") if there[kind]))
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type, False) or (device.index or 0) >= max(count, 1):
        found = ", ".join(kind for kind, available in there.items() if available)
        raise UsageError(
            f"there is no device {name!r} here",
            reasons=[f"found: {found}" + (f" ({count} CUDA devices)" if there["cuda"] else "")],
            next_step="leave the setting device out to take what is there",
        )
    return device


def _device_of_process(device: torch.device, process: int) -> torch.device:
    """The device of one of several processes on this machine; on a CPU they share it.

    Raises:
        UsageError: the setting names one device for all, or there are fewer devices than processes.
    """
    if device.type not in ("cuda", "xpu"):
        return device
    if str(device) != device.type:
        raise UsageError(
            f"several processes cannot share the device {str(device)!r}",
            next_step=f'write device = "{device.type}", so that every process has a device of its own',
        )
    module = torch.get_device_module(device)
    there = module.device_count()
    if process >= there:
        raise UsageError(
            f"there is no device for process {process} of this machine",
            reasons=[f"found: {there} {device.type} devices"],
            next_step="start as many processes on this machine as it has devices",
        )
    own = torch.device(device.type, process)
    module.set_device(own)
    return own


def has_matrix_tiles() -> bool:
    """Whether torch runs products in bf16 on this CPU's matrix tiles (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_bf16_vectors() -> bool:
    """Whether torch runs products in bf16 on this CPU's vectors (AVX-512 BF16)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def bf16_support(device: torch.device) -> tuple[bool, str]:
    """Whether a device multiplies bf16 matrices faster than fp32, and the reason."""
    if device.type == "cuda":
        able = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return able, f"the device {'multiplies' if able else 'only emulates'} bf16"
    if device.type == "xpu":
        return True, "the device multiplies bf16"
    if device.type != "cpu":
        return False, f"on {device.type} it was not measured"
    if has_matrix_tiles():
        return True, "this CPU's matrix tiles (AMX) multiply bf16"
    if not has_bf16_vectors():
        return False, "this CPU emulates bf16, slower than fp32"
    if made_by_intel():
        return False, "the vectors of Intel's CPUs multiply bf16 slower than fp32, and there are no matrix tiles"
    return True, "this CPU's vectors multiply bf16"
