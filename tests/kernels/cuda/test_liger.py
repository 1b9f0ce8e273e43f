"""liger-kernel's place is taken by functions of torch: what is tested is how they are put in, and when they are not."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.kernels.cuda.liger import use_liger
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import tiny_base

CPU = torch.device("cpu")


def rms_norm(hidden, weight, eps, offset, casting_mode, in_place):
    assert casting_mode == ("gemma" if offset else "llama")
    assert not in_place
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(hidden.dtype) * weight if not offset else (normed * (offset + weight.float())).to(hidden.dtype)


@pytest.fixture
def functions(monkeypatch):
    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_rms_norm = rms_norm
    module.liger_swiglu = lambda gate, up: F.silu(gate) * up
    module.liger_geglu = lambda gate, up: F.gelu(gate, approximate="tanh") * up
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_and_mlps_are_replaced_and_learn_the_same(tmp_path, functions, family):
    folder = tiny_base(tmp_path / "base", blocks=2, family=family)
    batch = collate([Example(i, np.random.default_rng(i).integers(0, 300, size), 2) for i, size in enumerate((9, 14))])

    def outcome(*, replaced):
        model = load_model(folder, dtype=torch.float32, device=CPU)
        pieces = use_liger(model) if replaced else ()
        model.requires_grad_(True)
        total, _ = label_losses(split_backbone_and_head(model), batch)
        total.backward()
        return pieces, total, {name: parameter.grad for name, parameter in model.named_parameters()}

    _, expected, slopes = outcome(replaced=False)
    (norms, mlps), found, others = outcome(replaced=True)
    assert (norms.count, mlps.count) == (4 * 2 + 1 if family == "gemma2" else 2 * 2 + 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert others.keys() == slopes.keys()  # parameters keep their names
    for name, slope in slopes.items():
        torch.testing.assert_close(others[name], slope, rtol=1e-4, atol=1e-5, msg=name)


def test_a_kernel_that_computes_something_else_is_left_out(tmp_path, functions):
    functions.liger_rms_norm = lambda hidden, weight, **settings: hidden * weight
    model = load_model(tiny_base(tmp_path / "base", blocks=2), dtype=torch.float32, device=CPU)
    norms, mlps = use_liger(model)
    assert (norms.count, norms.reason) == (0, "all 5 of this form compute something else")
    assert mlps.count == 2
