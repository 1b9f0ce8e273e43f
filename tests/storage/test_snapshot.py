"""One pass over a file hashes, parses and holds it; what is not held is compared again before anybody gets it."""

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from offsite.errors import StorageError, VerificationError
from offsite.storage import snapshot
from offsite.storage.files import Written
from offsite.storage.safetensors_files import from_array, read_chunks, read_float32, read_header, write_safetensors
from offsite.storage.snapshot import Snapshot, holds_tensors, read_file

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "empty": np.empty((0, 4), np.float32),
    "long": np.arange(700_000, dtype=np.float32),  # of more bytes than are read at once
    "scalar": np.float32(3).reshape(()),
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    dtypes = {"long": "BF16"}
    write_safetensors(file, [from_array(name, array, dtypes.get(name, "F32")) for name, array in ARRAYS.items()])
    return file


def listed(*files: Path) -> list[Written]:
    return [Written(file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]


@pytest.mark.parametrize("hold", [True, False])
def test_a_file_of_tensors_is_hashed_and_parsed(weights: Path, hold: bool) -> None:
    found = read_file(weights, hold=hold)
    assert found.is_file(listed(weights)[0])
    assert found.header == read_header(weights)
    assert found.content is None
    assert (found.tensors is not None) == hold


def test_held_tensors_are_those_of_the_file(weights: Path) -> None:
    held = read_file(weights, hold=True).tensors
    assert held is not None
    for name, tensor in read_header(weights).items():
        ours = held[name]
        assert (ours.name, ours.dtype, ours.shape, ours.size) == (name, tensor.dtype, tensor.shape, tensor.size)
        assert b"".join(read_chunks(ours)) == b"".join(read_chunks(tensor))
        np.testing.assert_array_equal(read_float32(ours), read_float32(tensor))
        address = np.frombuffer(ours.content, np.uint8).ctypes.data if ours.size else 0
        assert address % 64 == 0
        assert not ours.content.readonly


def test_what_is_not_held_takes_up_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    write_safetensors(file, [from_array("a", np.zeros(8 * 2**20, np.float32), "F32")])
    peaks = {}
    for hold in (False, True):
        tracemalloc.start()
        found = read_file(file, hold=hold)
        peaks[hold] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.sha256
    assert peaks[False] < 4 * 2**20
    assert 32 * 2**20 < peaks[True] < 36 * 2**20  # once, and not twice


@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 699_999])  # in the first, at the edges of, and in later parts
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("hold", [True, False])
def test_numbers_that_are_none_are_named(tmp_path: Path, place: int, value: float, hold: bool) -> None:
    array = np.ones(700_000, np.float32)
    array[place] = value
    file = tmp_path / "a.safetensors"
    write_safetensors(file, [from_array("good", np.ones(3, np.float32), "F32"), from_array("bad", array, "F32")])
    assert read_file(file, hold=hold, look_for_nan=True).not_finite == ["bad"]
    assert read_file(file, hold=hold).not_finite == []


def test_a_small_file_is_held_up_to_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"x" * 100)
    assert read_file(file, hold=False).content == b"x" * 100
    over = read_file(file, hold=False, most=99)
    assert (over.content, over.sha256, over.size) == (None, None, 100)  # nor is it hashed


def test_a_file_of_another_size_than_expected_is_not_hashed(tmp_path: Path) -> None:
    for name in ("config.json", "a.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 100)
        found = read_file(tmp_path / name, 99, hold=True)
        assert (found.size, found.sha256, found.content) == (100, None, None)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x09\0\0\0\0\0\0\0{}"])
def test_a_file_with_a_broken_header_is_not_hashed(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    found = read_file(file, hold=True)
    assert found.sha256 is None
    assert found.header is None
    assert found.tensors is None
    assert isinstance(found.problem, StorageError)


def appended(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


def cut(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize("change", [appended, cut])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_changes_its_length_while_it_is_read(
    weights: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], None]
) -> None:
    file = weights.rename(weights.with_name(name))
    expected, opened = listed(file)[0], snapshot.open_regular

    class Changing:
        """A file that somebody writes to once its size was asked for."""

        def __init__(self, stream: BinaryIO) -> None:
            self.stream = stream

        def fileno(self) -> int:
            return self.stream.fileno()

        def __enter__(self) -> "Changing":
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def __getattr__(self, name: str) -> Any:
            if file.stat().st_size == expected.size:
                change(file)
            return getattr(self.stream, name)

    monkeypatch.setattr(snapshot, "open_regular", lambda path: Changing(opened(path)))
    found = read_file(file, hold=True)
    assert not found.is_file(expected)
    assert found.sha256 is None
    assert found.size != expected.size


def test_a_snapshot_gives_what_it_holds_and_reads_the_rest(weights: Path) -> None:
    config = weights.with_name("config.json")
    config.write_bytes(b"{}")
    files = listed(weights, config)
    held = {file.name: read_file(file, hold=True) for file in (weights, config)}
    for one in (Snapshot(weights.parent, files, held), Snapshot(weights.parent, files)):
        assert one.names() == {"model.safetensors", "config.json"}
        assert one.read("config.json") == b"{}"
        assert one.header("model.safetensors") == read_header(weights)
        assert one.checkpoint().tensors == read_header(weights)
        assert one.tensors("model.safetensors") is one.tensors("model.safetensors")
        with pytest.raises(FileNotFoundError):
            one.read("tokenizer.json")
        with pytest.raises(StorageError):
            one.read("model.safetensors")
        with pytest.raises(StorageError, match="holds no tensors"):
            one.tensors("config.json")


def test_tensors_that_were_taken_are_read_again(weights: Path) -> None:
    one = Snapshot(weights.parent, listed(weights), {weights.name: read_file(weights, hold=True)})
    content = weights.read_bytes()
    weights.unlink()
    assert one.take_tensors().keys() == ARRAYS.keys()
    with pytest.raises(VerificationError, match="changed after it was verified") as caught:
        one.take_tensors()
    assert caught.value.reasons == ("it is gone",)
    weights.write_bytes(content)
    assert one.take_tensors().keys() == ARRAYS.keys()
    weights.write_bytes(content[:-1] + b"x")
    with pytest.raises(VerificationError, match="changed after it was verified") as caught:
        one.take_tensors()
    assert caught.value.reasons == ("its bytes are not those that were signed",)


def test_which_files_hold_tensors() -> None:
    assert holds_tensors("model-00001-of-00002.safetensors")
    assert not holds_tensors("model.safetensors.index.json")
