"""Finds out, without torch, which instructions this CPU has."""

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


def multiplies_bf16(info: Path = _INFO) -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32; False if the system does not say.

    Intel's vector units multiply bf16 at half the speed of fp32 (benchmarks/NOTES.md); only its matrix tiles are
    faster, and virtual machines often hide these. AMD's vector units are faster in bf16.

    Args:
        info: the file in which the Linux kernel describes the CPU.
    """
    return has_tiles(info) or ("avx512_bf16" in _words(info) and not made_by_intel(info))


def has_tiles(info: Path = _INFO) -> bool:
    """Whether this CPU has matrix tiles (AMX); False if the system does not say."""
    return "amx_tile" in _words(info)


def made_by_intel(info: Path = _INFO) -> bool:
    """Whether Intel made this CPU; False if the system does not say."""
    return "GenuineIntel" in _words(info)


def _words(info: Path) -> set[str]:
    """All words of the system's description of the CPU; on Linux, of the file `info`."""
    if platform.system() != "Linux":
        return set(platform.processor().replace(",", " ").split())
    try:
        return set(info.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()
