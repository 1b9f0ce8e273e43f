"""Examines the machine: the device and dtype that will be used, threads, free memory and free disk space."""

import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from offsite.kernels.runtime import bf16_support, resolve_runtime
from offsite.kernels.threads import available_cores
from offsite.study.doctor.finding import Finding

_LITTLE_MEMORY = 2 * 2**30  # a model of 135 million parameters tunes in less; the next larger ones do not
_LITTLE_DISK = 2 * 2**30  # room for the base, bundle and plug-in of a model of that size
_NO_DISK = 64 * 2**20  # less than the self-test and any artifact need
_CGROUP = Path("/sys/fs/cgroup")
_CPU_BUILD = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
_CUDA_BUILD = "install the build of torch for the driver's CUDA version: https://pytorch.org/get-started/locally"


def examine_machine(home: Path) -> tuple[dict[str, Any], list[Finding]]:
    """Examine device, dtype, memory and disk.

    Args:
        home: the folder of the party's home, which may not exist yet.

    Returns:
        The facts by name, sizes in bytes; and what is not as it should be.
    """
    runtime = resolve_runtime()
    fast, why = bf16_support(runtime.device)
    memory = free_memory()
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "torch_build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "device": _device_name(runtime.device),
        "compute_dtype": f"{'bf16' if fast else 'fp32'}: {why}",
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "memory_free_bytes": memory,
    }
    if runtime.device.type == "cuda":
        facts["device_memory_free_bytes"] = torch.cuda.mem_get_info(runtime.device)[0]
    disks = {"home": home, "working_folder": Path.cwd(), "temporary_files": Path(tempfile.gettempdir())}
    free = {name: free_disk(folder) for name, folder in disks.items()}
    facts["disk_free_bytes"] = free
    findings = [*_about_torch(), *_about_memory(memory)]
    for name, count in free.items():
        findings += _about_disk(disks[name], count)
    return facts, list(dict.fromkeys(findings))


def free_memory() -> int:
    """The number of bytes of memory that this process may still use, within the limit of its container."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
        except (OSError, ValueError):  # another version of cgroups, no container, or "max"
            continue
        free = min(free, max(0, left))
    return free


def free_disk(folder: Path) -> int:
    """The number of free bytes on the disk of a folder; if it does not exist yet, of the nearest one above it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _device_name(device: torch.device) -> str:
    """The device and its model name, such as "cuda: NVIDIA H200"."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return str(device)


def _about_torch() -> Iterator[Finding]:
    """Yield advice if the build of torch does not fit the machine."""
    nvidia = has_nvidia_device()
    if torch.cuda.is_available():
        return
    if torch.version.cuda and not nvidia:
        yield Finding(
            "advice",
            f"torch is a build for CUDA {torch.version.cuda}, and this machine has no NVIDIA device: "
            "the build for the CPU takes several GB less, and computes the same",
            _CPU_BUILD,
        )
    elif nvidia:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        yield Finding(
            "advice", f"this machine has an NVIDIA device, but torch, a build for {build}, cannot use it", _CUDA_BUILD
        )


def has_nvidia_device() -> bool:
    """Whether the driver of an NVIDIA device is loaded, whether or not torch can use it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _about_memory(free: int) -> Iterator[Finding]:
    """Yield advice if little memory is free."""
    if free < _LITTLE_MEMORY:
        yield Finding(
            "advice",
            f"only {free / 2**30:.1f} GiB of memory is free",
            "end other programs, or give `offsite tune --plan` the bundle to see whether it fits",
        )


def _about_disk(folder: Path, free: int) -> Iterator[Finding]:
    """Yield a problem if a disk is full, and advice if it is nearly full."""
    if free < _LITTLE_DISK:
        yield Finding(
            "problem" if free < _NO_DISK else "advice",
            f"only {free / 2**30:.1f} GiB is free on the disk of {folder}",
            f"free space there{', or set $TMPDIR to another disk' if folder == Path(tempfile.gettempdir()) else ''}",
        )
