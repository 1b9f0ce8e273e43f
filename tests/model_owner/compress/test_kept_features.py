"""A form that narrows layers names the features that stay: the stored tensors are the base's at exactly these."""

import numpy as np
import pytest

from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.carry_map import ALL
from offsite.model_owner.compress.declare_emulator import declared_of
from offsite.model_owner.compress.stored_form_protocol import BlockReshaping, form_of
from offsite.protocol.artifacts import Base
from offsite.storage.safetensors_files import read_float32
from tiny import MakeBase


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_features_are_those_of_the_reshaped_tensors(base_of: MakeBase, family: str) -> None:
    model, spec = open_base(Base(base_of(family))), PackSpec(mlp_width=0.25)
    declared = declared_of(model, 0, (0,), spec, None)
    assert declared is not None
    block = {path: read_float32(tensor) for path, tensor in model.block(1).items()}
    form = form_of(spec.stored_forms[0])
    assert isinstance(form, BlockReshaping)
    reshape = form.reshape(model.family, block.__getitem__, declared)
    kept = form.kept_features(model.family, block.__getitem__, declared)
    narrowed = 0
    for path in model.family.linears:
        features, weight, new = (
            kept.get(path, ALL),
            block[f"{path}.weight"],
            reshape(f"{path}.weight", block[f"{path}.weight"]),
        )
        if model.family.transposed:
            weight, new = weight.T, new.T
        rows = range(weight.shape[0]) if features.outputs is None else features.outputs
        columns = range(weight.shape[1]) if features.inputs is None else features.inputs
        assert np.array_equal(new, weight[np.ix_(rows, columns)])
        narrowed += new.shape != weight.shape
    assert narrowed == (3 if family == "llama" else 2)
