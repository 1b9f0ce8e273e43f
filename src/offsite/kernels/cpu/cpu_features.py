"""Which instructions this CPU has, found out without torch."""

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


def multiplies_bf16(info: Path = _INFO) -> bool:
    """Whether products in bf16 are faster than in fp32; False where the system does not say.

    Intel's vector units run products in bf16 at half the speed of fp32 (benchmarks/NOTES.md): only its matrix tiles
    pay, which virtual machines often hide. AMD's vector units are faster in bf16.

    Args:
        info: the kernel's description of the CPU.
    """
    return has_tiles(info) or ("avx512_bf16" in _words(info) and not made_by_intel(info))


def has_tiles(info: Path = _INFO) -> bool:
    """Whether it has matrix tiles (AMX); False where the system does not say."""
    return "amx_tile" in _words(info)


def made_by_intel(info: Path = _INFO) -> bool:
    """Whether Intel made it; False where the system does not say."""
    return "GenuineIntel" in _words(info)


def _words(info: Path) -> set[str]:
    if platform.system() != "Linux":
        return set(platform.processor().replace(",", " ").split())
    try:
        return set(info.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return set()
