"""PEFT's own layers as the oracle for those that run as one function."""

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.methods.lora import attach
from offsite.kernels.cpu.lora_linear import FusedLoraLinear, replace_lora_layers
from offsite.models.loading import load_model
from tiny import EVERY_KIND, KINDS, tiny_base, tiny_bundle, tiny_parties

CPU = torch.device("cpu")


def _attached(tmp_path, **settings):
    kind = settings.pop("kind", {"family": "llama"})
    bundle = tiny_bundle(
        tiny_base(tmp_path / "b", blocks=4, **kind), tmp_path / "bundle", tiny_parties(tmp_path), keep=1
    )
    model = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    pairs = attach(model, bundle.manifest, TuneSpec(rank=3, lora_alpha=9.0, **settings))
    generator = torch.Generator().manual_seed(0)
    for pair in pairs.values():  # B starts at zero, and would hide A
        pair.data.normal_(0, 0.1, generator=generator)
    return model, pairs


def _outcome(model, pairs):
    model.zero_grad()
    ids = torch.arange(3, 23).view(2, 10)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    return logits.detach(), {name: pair.grad.clone() for name, pair in pairs.items()}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_family_computes_and_learns_as_with_pefts_layers(tmp_path, kind):
    model, pairs = _attached(tmp_path, kind=KINDS[kind])
    expected, slopes = _outcome(model, pairs)
    places = {path for path, layer in model.named_modules() if type(layer) is Linear}
    assert replace_lora_layers(model).count == len(places) > 0
    assert {path for path, layer in model.named_modules() if type(layer) is FusedLoraLinear} == places
    found, lean_slopes = _outcome(model, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(lean_slopes[name], slope, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_keeps_pefts_layers(tmp_path):
    model, _ = _attached(tmp_path, lora_dropout=0.1)
    piece = replace_lora_layers(model)
    assert (piece.count, piece.reason) == (0, "they use dropout")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_function_passes_gradcheck(transposed):
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = nn.Linear(5, 4).double().requires_grad_(False)
    if transposed:
        base.weight = nn.Parameter(base.weight.T.contiguous(), requires_grad=False)
    halves = [nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)]
    lean = FusedLoraLinear(base, *halves, 1.5, transposed=transposed)

    def run(hidden, into, out_of):
        weights = {"lora_A.weight": into, "lora_B.weight": out_of}
        return torch.func.functional_call(lean, weights, hidden)

    inputs = [part.requires_grad_() for part in (numbers(2, 3, 5), numbers(2, 5), numbers(4, 2))]
    assert torch.autograd.gradcheck(run, inputs)


def test_a_pair_keeps_its_input_and_the_narrow_state():
    torch.manual_seed(0)
    base = nn.Linear(8, 32).requires_grad_(False)
    lean = FusedLoraLinear(base, nn.Linear(8, 2, bias=False), nn.Linear(2, 32, bias=False), 1.0, transposed=False)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        lean(torch.randn(5, 8, requires_grad=True))
    assert sorted(tuple(tensor.shape) for tensor in kept.values() if tensor.shape[0] == 5) == [(5, 2), (5, 8)]
