from pathlib import Path

import pytest

from offsite.kernels.cpu.cpu_features import has_tiles, made_by_intel, multiplies_bf16


@pytest.mark.parametrize(
    ("vendor", "flags", "pays"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),  # half as fast as fp32
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_bf16_pays_where_the_processor_multiplies_it_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, pays: bool
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n", encoding="ascii")
    assert multiplies_bf16(info) is pays
    assert has_tiles(info) is ("amx" in flags)
    assert made_by_intel(info) is (vendor == "GenuineIntel")


def test_a_processor_that_nobody_describes_computes_in_fp32(tmp_path: Path) -> None:
    assert not multiplies_bf16(tmp_path / "absent")


def test_windows_names_the_vendor_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 207 Stepping 2, GenuineIntel")
    assert made_by_intel()
    assert not multiplies_bf16()
