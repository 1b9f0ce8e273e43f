"""Mapped tensors are the bytes of their files, before and after their memory is released."""

from pathlib import Path

import numpy as np

from offsite.storage.mapped_files import MappedTensors
from offsite.storage.safetensors_files import from_array, read_float32, read_header, write_safetensors


def test_mapped_tensors_are_those_of_the_files(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {f"{file}.{name}": draw.standard_normal((300, 70), np.float32) for file in "ab" for name in "xy"}
    for file in "ab":
        held = [from_array(name, values, "F32") for name, values in arrays.items() if name[0] == file]
        write_safetensors(tmp_path / f"{file}.safetensors", held)
    ranges = [one for file in "ab" for one in read_header(tmp_path / f"{file}.safetensors").values()]
    mapped = MappedTensors(ranges)
    assert mapped.tensors.keys() == arrays.keys()
    for name, tensor in mapped.tensors.items():
        address = np.frombuffer(tensor.content, np.uint8).ctypes.data
        assert mapped.holds(address)
        assert mapped.holds(address + tensor.size - 1)
        for _ in range(2):
            assert np.array_equal(read_float32(tensor), arrays[name])
            mapped.release(address, tensor.size)


def test_memory_that_is_not_mapped_is_left_alone(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", [from_array("a", np.ones((4, 4), np.float32), "F32")])
    mapped = MappedTensors(read_header(tmp_path / "a.safetensors").values())
    own = np.full(2**16, 7, np.uint8)
    mapped.release(own.ctypes.data, own.size)
    assert not mapped.holds(own.ctypes.data)
    assert (own == 7).all()


def test_rows_of_a_tensor_are_its_rows(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    arrays = [from_array("a", values, "F32"), from_array("one", np.float32(5).reshape(()), "F32")]
    write_safetensors(tmp_path / "a.safetensors", arrays)
    held = read_header(tmp_path / "a.safetensors")
    for tensors in (held, MappedTensors(held.values()).tensors):
        assert np.array_equal(read_float32(tensors["a"].rows(slice(1, 3))), values[1:3])
        assert read_float32(tensors["one"].rows(slice(0, 1))).tolist() == [5]
