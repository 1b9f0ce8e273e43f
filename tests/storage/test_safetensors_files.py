import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from artifacts import raw_safetensors
from offsite.errors import StorageError
from offsite.storage import safetensors_files
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import (
    ITEM_SIZE,
    copied,
    finite,
    from_array,
    from_float32,
    read_chunks,
    read_float32,
    read_header,
    to_float32,
    write_safetensors,
)

TORCH: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def edge_values() -> np.ndarray[Any, Any]:
    """All that rounding can trip over: ties, denormals, the largest numbers, zeros, infinities, and random bits."""
    draw = np.random.default_rng(0)
    high = draw.integers(0, 2**16, 4000, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1FFF], np.uint32)
    bits = np.concatenate([(high[:, None] | low[None]).ravel(), draw.integers(0, 2**32, 20_000, dtype=np.uint32)])
    values = bits.astype(np.uint32).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 1e-45, 65504, 65519.996, 65520, 6e-8, 2.9e-8]
    return np.concatenate([values[~np.isnan(values)], np.array(special, np.float32)])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_torchs_bit_for_bit(dtype: str) -> None:
    values = edge_values()
    ours = from_float32(values, dtype).tobytes()
    theirs = torch.from_numpy(values.copy()).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFF80FFFF])
def test_not_a_number_stays_none(dtype: str, bits: int) -> None:
    """Rounding up the bits of a NaN could give infinity, or zero."""
    value = np.array([bits, 0x3F800000], np.uint32).view(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        raw = from_float32(value, dtype).tobytes()
    back = to_float32(raw, dtype)
    assert np.isnan(back[0])
    assert back[1] == 1
    scalar = torch.tensor(value[0]).to(TORCH[dtype])  # torch gives other NaN bits by scalar and by vector code
    assert torch.isnan(scalar)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_is_read_exactly(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    ours = to_float32(bits.tobytes(), dtype)
    theirs = torch.from_numpy(bits.copy().view(np.int16)).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    there = ~np.isnan(ours)
    assert from_float32(ours[there], dtype).tobytes() == bits[there].tobytes()


def test_too_large_for_half_precision_becomes_infinite_quietly() -> None:
    assert np.isinf(to_float32(from_float32(np.array([1e6], np.float32), "F16").tobytes(), "F16"))[0]


def test_no_float_dtype() -> None:
    with pytest.raises(TypeError):
        to_float32(b"", "I32")
    with pytest.raises(TypeError):
        from_float32(np.zeros(1, np.float32), "I32")


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "bf16.odd": torch.randn(3).to(torch.bfloat16),
        "f32": torch.randn(5, 7),
        "f16": torch.randn(2, 3, 4).half(),
        "i64": torch.arange(6).reshape(2, 3),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "f64": torch.randn(3, dtype=torch.float64),
    }


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    held = open_checkpoint(tmp_path)
    assert set(held.tensors) == set(tensors)
    assert held.size == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, tensor in tensors.items():
        found = held.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.size == tensor.numel() * ITEM_SIZE[found.dtype]
        assert b"".join(read_chunks(found)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    for name in ("f32", "f16", "bf16.odd", "scalar", "empty"):
        np.testing.assert_array_equal(read_float32(held.tensors[name]), tensors[name].float().numpy())


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    """In any order of dtypes: each tensor must start at a multiple of its item size."""
    tensors = some_tensors()
    save_file(tensors, tmp_path / "source.safetensors", {"format": "pt"})
    held = read_header(tmp_path / "source.safetensors")
    for seed in range(5):
        order = list(tensors)
        random.Random(seed).shuffle(order)
        file = tmp_path / f"{seed}.safetensors"
        written = write_safetensors(file, [copied(held[name]) for name in order])
        found = load_file(file)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(t.start % ITEM_SIZE[t.dtype] == 0 for t in read_header(file).values())
        assert written.size == file.stat().st_size
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}


@pytest.mark.parametrize("chunk", [8, 16, 4096])
def test_casting_on_the_way_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(safetensors_files, "CHUNK_BYTES", chunk)
    tensors = some_tensors()
    save_file(tensors, tmp_path / WEIGHTS)
    held = open_checkpoint(tmp_path).tensors
    for dtype in ("F32", "BF16", "F16"):
        file = tmp_path / f"{dtype}.safetensors"
        write_safetensors(file, [copied(t, name=f"new.{n}", dtype=dtype) for n, t in held.items()])
        for name, tensor in load_file(file).items():
            source = tensors[name.removeprefix("new.")]
            expected = source.to(TORCH[dtype]) if source.dtype in TORCH.values() else source
            assert torch.equal(tensor, expected)


def test_arrays(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    write_safetensors(tmp_path / "x", [from_array("a", array.T, "F32"), from_array("b", array, "BF16")])
    found = load_file(tmp_path / "x")
    np.testing.assert_array_equal(found["a"].numpy(), array.T)
    assert torch.equal(found["b"], torch.from_numpy(array).to(torch.bfloat16))


def test_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "CHUNK_BYTES", 8)
    for dtype in ("F32", "BF16", "F16"):
        for value, expected in ((1.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)):
            (tmp_path / "x").unlink(missing_ok=True)
            array = np.ones(9, np.float32)
            array[8] = value
            write_safetensors(tmp_path / "x", [from_array("a", array, dtype)])
            assert finite(read_header(tmp_path / "x")["a"]) is expected


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [from_array("a", np.zeros(100, np.float32), "F32")])
    tensor = read_header(tmp_path / "x")["a"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-5])
    with pytest.raises(StorageError, match="ends 5 bytes before the end of tensor 'a'"):
        list(read_chunks(tensor, "BF16"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        read_header(tmp_path / "nothing")


def test_file_without_tensors(tmp_path: Path) -> None:
    assert read_header(raw_safetensors(tmp_path / "x", {})) == {}
