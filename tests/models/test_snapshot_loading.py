"""A model that is loaded from the files that were verified is the one that its folder holds."""

import shutil

import pytest
import torch

from artifacts import packed
from offsite.models.loading import load_model
from offsite.protocol.verify import verify_bundle
from tiny import KINDS, VISION_KINDS, tiny_base, tiny_parties, tiny_vision_base

CPU = torch.device("cpu")


def same_model(ours, theirs):
    assert type(ours) is type(theirs)
    assert ours.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": ours.config.to_dict()["_name_or_path"]}
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, *VISION_KINDS])
def test_it_is_the_model_of_the_folder(tmp_path, kind, dtype):
    parties = tiny_parties(tmp_path)
    if kind in KINDS:
        base = tiny_base(tmp_path / "base", blocks=3, **KINDS[kind])
    else:
        base = tiny_vision_base(tmp_path / "base", kind, 3)
    packed(base, tmp_path / "bundle", parties, dtype="bf16")
    bundle = verify_bundle(tmp_path / "bundle", parties.data_owner, hold=True)
    theirs = load_model(bundle.folder, dtype=dtype, device=CPU)
    shutil.rmtree(bundle.folder)
    same_model(load_model(bundle.files, dtype=dtype, device=CPU), theirs)
