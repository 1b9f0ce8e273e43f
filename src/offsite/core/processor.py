"""What this machine's processor is good at, found out without torch."""

import platform
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


def multiplies_bf16(info: Path = _INFO) -> bool:
    """Whether products in bf16 are faster than in fp32; False where the system does not say.

    Intel's vector units take two cycles for the dot product of bf16 and half of one for fp32's: only its matrix tiles
    pay, which virtual machines often hide. AMD's take one (uops.info on VDPBF16PS; benchmarks/NOTES.md has a machine).

    Args:
        info: the kernel's description of the processor.
    """
    words = _words(info)
    return "amx_tile" in words or ("avx512_bf16" in words and not made_by_intel(info))


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
