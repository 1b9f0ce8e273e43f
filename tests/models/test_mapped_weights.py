"""A model whose weights stay in their files computes what it computes in memory, with a part of them in memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.kernels.peak_memory import peak_memory
from offsite.models import mapped_weights
from offsite.models.loading import load_model
from offsite.models.mapped_weights import ReleasedWeights
from offsite.models.torch_tensors import read_tensor
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.mapped_files import MappedTensors
from offsite.storage.safetensors_files import from_array, read_header, write_safetensors
from tiny import FAMILIES, Family, MakeBase


@pytest.mark.parametrize("family", FAMILIES)  # of which one stores weights as (inputs, outputs), with biases
def test_logits_are_those_of_the_model_in_memory(
    family: Family, base_of: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, ids = base_of(family), torch.tensor([[1, 5, 9, 40]])
    dtype, device = torch.float32, torch.device("cpu")
    mapped = MappedTensors(open_checkpoint(base).tensors.values())
    model = load_model(base, dtype=dtype, device=device, tensors=mapped.tensors)
    assert all(mapped.holds(one.data_ptr()) for one in model.parameters())
    monkeypatch.setattr(mapped_weights, "_PART_BYTES", 300)
    with torch.no_grad(), ReleasedWeights(mapped):
        found = model(input_ids=ids).logits
    with torch.no_grad():
        expected = load_model(base, dtype=dtype, device=device)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_holds_a_part_of_the_matrix(transposed: bool, tmp_path: Path) -> None:
    values = np.full((4096, 4096), 0.5, np.float32)  # 64 MiB
    write_safetensors(tmp_path / "a.safetensors", [from_array("a", values, "F32")])
    del values
    mapped = MappedTensors(read_header(tmp_path / "a.safetensors").values())
    matrix, left = read_tensor(mapped.tensors["a"]), torch.ones(2, 4096)

    def run() -> None:
        with ReleasedWeights(mapped):
            product = left @ (matrix.T if transposed else matrix)
            assert (product == 2048).all()

    run()  # whatever a first product allocates
    before, peak = peak_memory(run, torch.device("cpu"))
    assert peak - before < 40 * 2**20
