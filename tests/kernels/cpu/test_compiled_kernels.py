"""What setup compiled, against torch in fp32; where it did not, or the processor lacks what it needs, torch runs."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from offsite.kernels.cpu import compiled_kernels as kernels
from offsite.kernels.cpu import fused_modules
from offsite.kernels.cpu.thread_dropout import LEVELS
from offsite.kernels.fused_loss import labelled_cross_entropy

needs_tiles = pytest.mark.skipif(kernels.level()[0] < 2, reason="no matrix tiles here, or nothing was compiled")
needs_vectors = pytest.mark.skipif(kernels.level()[0] < 1, reason="no vectors of bf16 here, or nothing was compiled")


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, over all numbers; rounding each to bf16 alone makes 0.0017."""
    return float((found.float() - expected).norm() / expected.norm())


def random(*shape: int, seed: int = 0, times: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * times).bfloat16()


def by_the_book(query, key, value, scale, causal, lives=None):
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    length = query.shape[2]
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril() & causal
    shares = (query @ key.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    return ((shares if lives is None else shares * lives) @ value).transpose(1, 2)


def compared(query, key, value, scale, *, causal, dropped=0, seed=0, lives=None):
    """How far output and gradients are from what papers write."""
    wide = [part.float().requires_grad_(True) for part in (query, key, value)]
    expected = by_the_book(*wide, scale, causal, lives)
    grad_output = random(*expected.shape, seed=9)
    slopes = torch.autograd.grad(expected, wide, grad_output.float())
    settings = kernels.AttentionSettings(scale, causal, dropped, seed)
    output, logarithms = kernels.attend(query, key, value, settings)
    gradients = kernels.attend_back(grad_output, (query, key, value), output, logarithms, settings)
    return [off_by(one, other) for one, other in zip((output, *gradients), (expected.detach(), *slopes), strict=True)]


@needs_tiles
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "length", "width"),
    [(1, 1, 1, 1, 8), (2, 6, 2, 7, 8), (1, 4, 4, 64, 64), (2, 3, 3, 100, 64), (2, 4, 2, 193, 80), (1, 9, 3, 300, 128)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_is_what_papers_write(rows, heads, groups, length, width, causal, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    query, key, value = (
        random(rows, length, count, width, seed=seed).transpose(1, 2)  # tokens first in memory, as projections leave it
        for seed, count in enumerate((heads, groups, groups))
    )
    assert max(compared(query, key, value, 0.3, causal=causal)) < 0.006


@needs_tiles
def test_large_scores_and_far_ones_are_attended_too():
    query, key, value = (random(1, 2, 150, 32, seed=seed, times=times) for seed, times in enumerate((30, 30, 1)))
    assert max(compared(query, key, value, 1.0, causal=True)[::3]) < 0.006  # output and the value's gradient
    query, key, value = (random(1, 2, 150, 32, seed=seed, times=4) for seed in range(3))
    assert max(compared(query, key, value, 0.5, causal=False)) < 0.02


@needs_tiles
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [40, 200])
def test_dropout_takes_the_share_that_was_asked_for_and_the_same_backwards(length, causal):
    query, key, value = (random(2, 2, length, 16, seed=seed) for seed in range(3))
    dropped, units = LEVELS // 4, torch.eye(length, dtype=torch.bfloat16).expand(2, 2, length, length).contiguous()
    zeros = torch.zeros(2, 2, length, length, dtype=torch.bfloat16)

    def lives(seed):  # values that show each share, all of which are the same before dropout
        shown, _ = kernels.attend(zeros, zeros, units, kernels.AttentionSettings(1.0, causal, dropped, seed))
        return (shown.transpose(1, 2) != 0).float()

    mask = lives(5)
    seen = torch.ones(length, length).tril().bool() if causal else torch.ones(length, length).bool()
    assert abs(float(mask[..., seen].mean()) - 0.75) < 0.015
    assert torch.equal(mask, lives(5))
    assert not torch.equal(mask, lives(6))
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert not torch.equal(mask[0, 0], mask[1, 0])
    errors = compared(query, key, value, 0.3, causal=causal, dropped=dropped, seed=5, lives=mask / 0.75)
    assert max(errors) < 0.006


@needs_tiles
def test_what_is_no_number_is_not_hidden():
    query, key, value = (random(1, 2, 70, 16, seed=seed) for seed in range(3))
    query[0, 1, 66, 3] = torch.nan
    settings = kernels.AttentionSettings(0.3, causal=True)
    output, logarithms = kernels.attend(query, key, value, settings)
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 66, 1]]
    gradients = kernels.attend_back(output, (query, key, value), output, logarithms, settings)
    assert all(gradient.isnan().any() for gradient in gradients)
    query[0, 1, 66, 3], key[0, 0, 5, 3] = 0, torch.nan  # one share of each query from the fifth on
    output, _ = kernels.attend(query, key, value, settings)
    assert output[0].isnan().any(-1).all(-1).nonzero().flatten().tolist() == []
    assert output[0, :, 0].isnan().any(-1).nonzero().flatten().tolist() == list(range(5, 70))
    nats, logits = torch.empty(1), random(1, 40)
    logits[0, 7] = torch.nan
    kernels.softmax_(logits, torch.tensor([3]), nats, slopes=False)
    assert nats.isnan().all()


@needs_tiles
def test_products_of_torch_are_as_before_after_attention():
    left, right = random(300, 300), random(300, 300, seed=1)
    before = left @ right
    kernels.attend(*(random(1, 1, 40, 8) for _ in range(3)), kernels.AttentionSettings(1.0, causal=True))
    assert torch.equal(left @ right, before)
    assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) > 0  # small numbers are not made zeros


@needs_vectors
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 64), (2, 3, 100)])
@pytest.mark.parametrize("threads", [1, 3])
def test_activations_and_norms_are_those_of_torch(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    given, up, grad_output = random(*shape, times=3), random(*shape, seed=1), random(*shape, seed=2)
    wide, wide_up = given.float().requires_grad_(True), up.float().requires_grad_(True)

    value = F.gelu(wide, approximate="tanh")
    assert off_by(kernels.gelu(given), value.detach()) < 0.004
    assert (
        off_by(kernels.gelu_back(grad_output, given), torch.autograd.grad(value, wide, grad_output.float())[0]) < 0.004
    )

    value = F.silu(wide) * wide_up
    slopes = torch.autograd.grad(value, (wide, wide_up), grad_output.float())
    assert off_by(kernels.gated(given, up), value.detach()) < 0.004
    for found, expected in zip(kernels.gated_back(grad_output, given, up), slopes, strict=True):
        assert off_by(found, expected) < 0.004

    weight = random(shape[-1], seed=3)
    value = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()
    slope = torch.autograd.grad(value, wide, grad_output.float())[0]
    normed, scales = kernels.rms_norm(given, weight, 1e-5)
    assert off_by(normed, value.detach()) < 0.006
    found = kernels.rms_norm_back(grad_output, scales, given, weight)
    assert (found.float() - slope).norm() <= 0.006 * (grad_output.float() * weight).norm() * float(scales.max())


@needs_vectors
@pytest.mark.parametrize("width", [3, 16, 1001])
@pytest.mark.parametrize("slopes", [True, False])
def test_softmax_is_that_of_torch(width, slopes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(kernels, "LEAST_WORK", 1)
    logits, labels, nats = random(5, width, times=5), torch.arange(5) % width, torch.empty(5)
    wide = logits.float().requires_grad_(True)
    expected = F.cross_entropy(wide, labels, reduction="none")
    slope = torch.autograd.grad(expected.sum(), wide)[0] if slopes else wide.detach()
    kernels.softmax_(logits, labels, nats, slopes=slopes)
    assert torch.allclose(nats, expected, atol=1e-5)
    assert torch.allclose(logits.float(), slope, rtol=0.004, atol=1e-6)
    for label in (-1, width):
        with pytest.raises(IndexError, match=f"of a vocabulary of {width}"):
            kernels.softmax_(logits, torch.full((5,), label), nats, slopes=slopes)


@needs_vectors
def test_activations_of_far_numbers_are_zero_or_the_number():
    far = torch.tensor([-torch.inf, -1e9, -300.0, -90.0, 0.0, 90.0, 300.0, 1e9], dtype=torch.bfloat16)
    assert torch.equal(kernels.gelu(far[1:]), torch.where(far > 0, far, 0)[1:])
    assert torch.equal(kernels.gated(far[1:], torch.ones_like(far[1:])), torch.where(far > 0, far, 0)[1:])
    assert kernels.gelu(torch.tensor([torch.nan], dtype=torch.bfloat16)).isnan().all()
    assert kernels.gelu_back(torch.ones(8, dtype=torch.bfloat16), far)[1:].tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@needs_vectors
@pytest.mark.parametrize("gate", fused_modules._GATES)
def test_modules_run_them_in_bf16_alone(gate, monkeypatch):
    calls = []
    for name in ("gelu", "gelu_back", "gated", "gated_back", "rms_norm", "rms_norm_back"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, name=name, run=run: calls.append(name) or run(*given))
    modules = [
        fused_modules.TanhGELU(),
        fused_modules.RMSNorm(torch.nn.Parameter(torch.ones(8), requires_grad=False), 1e-5),
    ]
    modules.append(fused_modules.GatedMLP(*(torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(3)), gate))
    for module in modules:
        module(random(4, 8).float().requires_grad_(True)).sum().backward()
    assert not calls
    for module in modules:
        module.bfloat16()(random(4, 8).requires_grad_(True)).sum().backward()
    names = ["gated"] if gate is fused_modules._SILU else ["gelu", "gelu"]
    assert sorted(call for call in calls if call.endswith("back")) == sorted(
        ["gelu_back", "rms_norm_back", "gated_back" if gate is fused_modules._SILU else "gelu_back"]
    )
    assert set(names) <= set(calls)


def test_they_can_be_switched_off():
    said = subprocess.run(
        [sys.executable, "-c", "from offsite.kernels.cpu import compiled_kernels; print(compiled_kernels.level())"],
        env=os.environ | {"OFFSITE_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "(0, 'switched off by OFFSITE_KERNELS=0')\n"


def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "VERSION", -1)
    assert kernels.level.__wrapped__()[0] == 0


@needs_vectors
def test_the_loss_runs_its_softmax(monkeypatch):
    weight, hidden, labels = random(50, 8), random(6, 8, seed=1), torch.arange(6)
    calls, run = [], kernels.softmax_
    monkeypatch.setattr(kernels, "softmax_", lambda *given, **asked: calls.append(1) or run(*given, **asked))
    labelled_cross_entropy(hidden, weight, labels)
    labelled_cross_entropy(hidden, weight, labels, cap=30.0)
    labelled_cross_entropy(hidden.float(), weight.float(), labels)
    assert len(calls) == 1
