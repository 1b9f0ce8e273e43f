"""The frozen linear maps: what they compute is the matrix that they stand for, and so is the gradient."""

import numpy as np
import pytest
import torch

from offsite.model_owner.compress.low_rank import factorise
from offsite.model_owner.compress.quantise import quantise
from offsite.models.modules.compressed_linear import FactoredLinear, QuantisedLinear


def linear_of(weight: torch.Tensor, bits: int, group: int = 64) -> QuantisedLinear:
    codes, scales = quantise(weight.numpy(), bits, group)
    return QuantisedLinear(torch.from_numpy(codes), torch.from_numpy(scales), None, weight.shape[1], group)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [7, 64, 130])
def test_weights_are_off_by_half_a_step_at_most(bits: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, inputs)
    found = linear_of(weight, bits).weight_in(torch.float32)
    step = torch.stack([part.abs().amax(1) for part in weight.split(64, dim=1)], 1) / (2 ** (bits - 1) - 1)
    allowed = step.repeat_interleave(64, 1)[:, :inputs] / 2 * 1.001
    assert ((found - weight).abs() <= allowed).all()
    assert (found != weight).any()
    assert (linear_of(torch.zeros(3, inputs), bits).weight_in(torch.float32) == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_product_and_gradient_are_those_of_the_matrix(bits: int) -> None:
    torch.manual_seed(0)
    linear = linear_of(torch.randn(5, 33), bits)
    hidden = torch.randn(2, 3, 33, requires_grad=True)
    linear(hidden).square().sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    (plain @ linear.weight_in(torch.float32).T).square().sum().backward()
    assert hidden.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_four_bits_take_half_a_byte() -> None:
    linear = linear_of(torch.randn(16, 128), 4)
    assert linear.quantised.numel() == 16 * 64
    assert linear.quantised.dtype == torch.uint8


def test_factors_at_full_rank_are_the_matrix_and_below_the_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    down, up = factorise(weight, 6)
    np.testing.assert_allclose(up @ down, weight, atol=1e-5)
    down, up = factorise(weight, 2)
    assert (down.shape, up.shape) == ((2, 9), (6, 2))
    values = np.linalg.svd(weight, compute_uv=False)
    assert np.linalg.norm(weight - up @ down) == pytest.approx(np.sqrt(np.square(values[2:]).sum()), rel=1e-4)
    hidden, bias = torch.randn(4, 9), torch.randn(6)
    made = FactoredLinear(torch.from_numpy(down), torch.from_numpy(up), bias)
    torch.testing.assert_close(made(hidden), hidden @ torch.from_numpy(up @ down).T + bias)
