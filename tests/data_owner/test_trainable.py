"""What trains is what the table says, in every family: the trained blocks' linear maps, or all of their tensors."""

import pytest
import torch

from offsite.config import TuneSpec
from offsite.core.architectures import ARCHITECTURES
from offsite.core.load import load_model
from offsite.data_owner.methods import METHODS
from tiny import KINDS, tiny_base, tiny_bundle, tiny_parties


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_trainable_set_is_the_tables(tmp_path, kind, method):
    row = ARCHITECTURES[KINDS[kind]["family"]]
    bundle = tiny_bundle(
        tiny_base(tmp_path / "b", blocks=5, **KINDS[kind]), tmp_path / "bundle", tiny_parties(tmp_path), keep=2
    )
    model = load_model(bundle.folder, dtype=torch.float32, device=torch.device("cpu"))
    spec = TuneSpec(method=method, rank=2, compute="fp32", device="cpu", threads=1)
    returned = METHODS[method](model, bundle.manifest, spec)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = (0, 3)
    if method == "full":
        paths = row.block_tensors(model.config.to_dict())
        assert trains == set(returned) == {row.in_block(index, path) for index in trained for path in paths}
    else:
        pairs = {f"{row.in_block(i, path)}.lora_{x}" for i in trained for path in row.linears for x in "AB"}
        assert trains == {f"{pair}.default.weight" for pair in pairs}
        assert set(returned) == {f"base_model.model.{pair}.weight" for pair in pairs}
