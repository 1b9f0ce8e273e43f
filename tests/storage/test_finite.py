"""NaN and infinity are found in every float dtype while a tensor is written, and nothing else is taken for them."""

from pathlib import Path

import pytest
import torch

from offsite.storage.finite import FiniteWatch, has_non_finite
from offsite.storage.safetensors_files import NewTensor, read_header, write_safetensors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def content(values: torch.Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: str) -> None:
    kind = DTYPES[dtype]
    limits = torch.finfo(kind)
    finite = torch.tensor([0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny], dtype=torch.float64).to(kind)
    assert not has_non_finite(content(finite), dtype)
    bad = [float("nan"), *([] if dtype == "F8_E4M3" else [float("inf"), float("-inf")])]
    for value in bad:
        spoilt = finite.double()
        spoilt[3] = value
        assert has_non_finite(content(spoilt.to(kind)), dtype)


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E4M3"])
def test_every_byte_of_the_small_dtypes(dtype: str) -> None:
    kind = DTYPES[dtype]
    for byte in range(256):
        value = torch.tensor([byte], dtype=torch.uint8).view(kind).float()
        assert has_non_finite(bytes([byte]), dtype) == (not bool(value.isfinite().all()))


def test_integers_are_not_looked_at() -> None:
    assert not has_non_finite(b"\xff" * 8, "I64")


def test_the_watch_names_tensors_and_changes_nothing(tmp_path: Path) -> None:
    good, bad = content(torch.ones(4)), content(torch.tensor([1.0, float("nan"), float("inf"), 2.0]))
    tensors = [
        NewTensor("good", "F32", (4,), lambda: [good]),
        NewTensor("bad", "F32", (4,), lambda: [bad[:8], bad[8:]]),
        NewTensor("places", "I32", (4,), lambda: [b"\xff" * 16]),
    ]
    watch = FiniteWatch()
    write_safetensors(tmp_path / "x.safetensors", watch.over(tensors))
    assert watch.found == ["bad"]
    stored = read_header(tmp_path / "x.safetensors")
    assert b"".join(stored["bad"].raw()) == bad
