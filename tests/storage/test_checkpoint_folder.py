import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offsite.errors import StorageError
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, open_checkpoint, write_checkpoint
from offsite.storage.safetensors_files import copied, from_array, read_float32, read_header, write_safetensors


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    save_file(tensors, tmp_path / "source.safetensors")
    held = read_header(tmp_path / "source.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    written = write_checkpoint(out, [copied(t) for t in held.values()], shard_bytes=100)
    assert [w.name for w in written] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)] + [INDEX]
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == 280
    found = open_checkpoint(out)
    assert {name: read_float32(t)[0] for name, t in found.tensors.items()} == {f"t{i}": i for i in range(7)}


def test_tensor_over_the_size_of_a_shard(tmp_path: Path) -> None:
    arrays = [from_array(f"t{i}", np.zeros(100, np.float32), "F32") for i in range(2)]
    assert len(write_checkpoint(tmp_path, arrays, shard_bytes=10)) == 3


def test_an_index_beside_weights_that_it_does_not_name_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [from_array(f"t{i}", np.zeros(3, np.float32), "F32") for i in range(2)], shard_bytes=12)
    write_safetensors(tmp_path / WEIGHTS, [from_array("t0", np.ones(3, np.float32), "F32")])
    with pytest.raises(StorageError) as caught:
        open_checkpoint(tmp_path)
    assert "side by side" in caught.value.reasons[0]


def test_an_index_of_the_one_file_is_no_second_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [from_array("a", np.zeros(3, np.float32), "F32")])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS}}))
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, [from_array("a", np.zeros(3, np.float32), "F32")])
    assert [w.name for w in written] == [WEIGHTS]


def test_missing_weights_and_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="found: nothing"):
        open_checkpoint(tmp_path)
    with pytest.raises(StorageError, match="is not a folder"):
        open_checkpoint(tmp_path / "nothing")
