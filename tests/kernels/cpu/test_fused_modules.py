import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.kernels.cpu.fused_modules import GatedMLP, QuickGELU, RMSNorm, fuse
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import EVERY_KIND, KINDS, tiny_base, tiny_vision_base

CPU = torch.device("cpu")


def replaced_in(model):
    return sum(piece.count for piece in fuse(model))


def _losses_and_gradients(folder, *, fused):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    count = replaced_in(model) if fused else 0
    model.requires_grad_(True)
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, size), 2) for i, size in enumerate((9, 14))]
    network = split_backbone_and_head(model)
    network.head.weight.requires_grad_(False)
    total, nats = label_losses(network, collate(examples))
    total.backward()
    return count, nats, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_family_computes_and_learns_the_same(tmp_path, kind):
    folder = tiny_base(tmp_path / "base", blocks=2, **KINDS[kind])
    _, expected, slopes = _losses_and_gradients(folder, fused=False)
    _, found, fused_slopes = _losses_and_gradients(folder, fused=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert fused_slopes.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(fused_slopes[name], slope, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "replaced"), [("llama", 2 * 2 + 2 + 1), ("gpt2", 2), ("gemma2", 4 * 2 + 2 + 1)])
def test_norms_and_mlps_are_found(tmp_path, family, replaced):
    model = load_model(tiny_base(tmp_path / "base", blocks=2, family=family), dtype=torch.bfloat16, device=CPU)
    assert replaced_in(model) == replaced


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_passes_gradcheck(offset):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(nn.Parameter(torch.rand(6, generator=generator, dtype=torch.float64)), 1e-6, offset)
    hidden = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, hidden)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(norm, {"weight": w}, hidden), norm.weight)


def test_clips_activation_is_found_and_passes_gradcheck(tmp_path):
    model = load_model(tiny_vision_base(tmp_path / "base", "clip tower", blocks=2), dtype=torch.bfloat16, device=CPU)
    assert replaced_in(model) == 2
    assert sum(isinstance(module, QuickGELU) for module in model.modules()) == 2
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(QuickGELU(), hidden)
    assert torch.allclose(QuickGELU()(hidden), hidden * torch.sigmoid(1.702 * hidden))


def test_a_module_that_only_looks_like_a_norm_stays():
    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, hidden):
            return torch.tanh(hidden) * self.weight

    model = nn.Sequential(Squashed())
    assert [(piece.count, piece.reason) for piece in fuse(model) if piece.name == "RMS norms"] == [
        (0, "all 1 of this form compute something else")
    ]
    assert isinstance(model[0], Squashed)


@pytest.mark.parametrize(
    ("activation", "found"), [("silu", 1), ("gelu_pytorch_tanh", 1), ("gelu_new", 1), ("gelu", 0), ("mish", 0)]
)
def test_an_mlp_of_another_activation_stays_however_small_its_weights(activation, found):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, hidden_act=activation)
    mlp = LlamaMLP(config).to(torch.bfloat16).requires_grad_(False)
    for weight in mlp.parameters():
        nn.init.normal_(weight, std=0.005)
    assert replaced_in(nn.ModuleList([mlp])) == found


def test_a_gated_mlp_keeps_two_tensors_of_its_inner_size():
    torch.manual_seed(0)
    parts = [nn.Linear(8, 32, bias=False), nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)]
    mlp = GatedMLP(*(part.requires_grad_(False) for part in parts), (nn.functional.silu, torch.ops.aten.silu_backward))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        mlp(torch.randn(5, 8, requires_grad=True))
    assert sorted(tuple(tensor.shape) for tensor in kept.values() if tensor.shape[0] == 5) == [(5, 32), (5, 32)]
