import numpy as np
import pytest
import torch
from torch.nn import functional as F

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.errors import IncompatibleError
from offsite.kernels.fused_loss import labelled_cross_entropy
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from tiny import EVERY_KIND, KINDS, tiny_base

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [1, 50, 64, 10_000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_value_and_gradient_are_those_of_torch(chunk, with_bias, cap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator)
    bias = torch.randn(11, generator=generator) if with_bias else None
    targets = torch.randint(0, 11, (13,), generator=generator)
    total, nats = labelled_cross_entropy(hidden, weight, targets, bias, cap, chunk_elements=chunk)
    (total / 7).backward()
    found, hidden.grad = hidden.grad, None
    logits = F.linear(hidden, weight, bias)
    capped = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(capped, targets, reduction="none")
    (expected.sum() / 7).backward()
    torch.testing.assert_close(nats, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(found, hidden.grad)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("chunk", [10, 100])
@pytest.mark.parametrize("body", [False, True], ids=["head alone", "body as well"])
def test_a_head_that_trains_gets_its_gradient(cap, chunk, body):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=body)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w, b: labelled_cross_entropy(h, w, targets, b, cap, chunk_elements=chunk)[0], (hidden, weight, bias)
    )


@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_gradient_passes_gradcheck(cap):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h: labelled_cross_entropy(h, weight, targets, cap=cap, chunk_elements=10)[0], hidden
    )


def test_bf16_keeps_the_softmax_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 32, generator=generator).bfloat16()
    targets = torch.randint(0, 500, (64,), generator=generator)
    total, nats = labelled_cross_entropy(hidden, weight, targets)
    total.backward()
    assert nats.dtype is torch.float32
    exact = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    torch.testing.assert_close(nats, exact.detach())
    assert hidden.grad.dtype is torch.bfloat16


def test_no_more_logits_exist_than_the_chunk_permits(monkeypatch):
    seen = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *inputs, out: seen.append(product(*inputs, out=out)) or seen[-1])
    labelled_cross_entropy(
        torch.randn(100, 4), torch.randn(50, 4), torch.zeros(100, dtype=torch.long), chunk_elements=500
    )
    assert max(logits.numel() for logits in seen) == 500


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_batch_gives_what_the_whole_model_gives_row_by_row(tmp_path, kind):
    model = load_model(tiny_base(tmp_path / "b", blocks=3, **KINDS[kind]), dtype=torch.float32, device=CPU)
    generator = np.random.default_rng(0)
    examples = [
        Example(i, generator.integers(0, 300, size), given) for i, (size, given) in enumerate(((9, 4), (20, 1), (3, 2)))
    ]
    with torch.no_grad():
        total, nats = label_losses(split_backbone_and_head(model), collate(examples))
        expected = []
        for example in examples:
            logits = model(torch.from_numpy(example.ids)[None]).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.from_numpy(example.ids[1:]), reduction="none")
            expected.append(losses[example.given - 1 :])
    torch.testing.assert_close(nats, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, nats.sum())


def test_a_family_that_caps_its_logits_is_refused(tmp_path):
    model = load_model(tiny_base(tmp_path / "b", blocks=1), dtype=torch.float32, device=CPU)
    forward = model.forward

    def capped(*inputs, **settings):
        output = forward(*inputs, **settings)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(IncompatibleError, match="linear head"):
        split_backbone_and_head(model)
