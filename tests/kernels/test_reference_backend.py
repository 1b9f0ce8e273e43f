"""The backend of plain torch, and that other devices than a CPU get its softmax, on whole chunks."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offsite.kernels import labelled_cross_entropy, reference_backend
from offsite.kernels.cpu import softmax as cpu_softmax


def test_no_micro_batch_waits_for_its_loss():
    """On the meta device every look at a value raises; on a card it would make the host wait."""
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    with reference_backend.micro_batch_runner() as run:
        losses = list(run(lambda factor: (weight * factor).sum(), [1.0, 2.0]))
    assert [loss.shape for loss in losses] == [(), ()]
    assert weight.grad is not None


def test_micro_batches_run_one_after_the_other_and_their_gradients_add_up():
    weight, ran = torch.nn.Parameter(torch.zeros(3)), []

    def loss_of(factor):
        ran.append(factor)
        return (weight * factor).sum() + factor

    with reference_backend.micro_batch_runner() as run:
        for number, loss in enumerate(run(loss_of, [1.0, 2.0, 4.0])):
            assert ran == [1.0, 2.0, 4.0][: number + 1]  # no later one has run
            assert loss == ran[-1]
            assert torch.equal(weight.grad, torch.full((3,), sum(ran)))


def test_work_without_gradients_runs_in_order():
    with reference_backend.forward_runner() as run:
        assert run.count == 1
        assert list(run(lambda number: 2 * number, [3, 1, 2])) == [6, 2, 4]


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("slopes", [False, True])
def test_slices_for_a_cpus_cache_give_what_the_whole_gives(monkeypatch, cap, slopes):
    monkeypatch.setattr(cpu_softmax, "SLICE_ELEMENTS", 2 * 11)
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    labels, found = torch.arange(7), []
    for softmax_ in (reference_backend.softmax_, cpu_softmax.softmax_):
        written, nats = logits.clone(), torch.empty(7)
        softmax_(written, labels, cap, nats, slopes=slopes)
        found.append((written, nats))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert slopes != torch.equal(found[0][0], logits)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.softmaxes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.softmaxes += func is torch.ops.aten._log_softmax.default
        return func(*args, **(kwargs or {}))


def test_on_another_device_a_chunk_has_one_softmax_and_no_value_is_looked_at():
    """1,024 labels of 128,000 words: in slices for a CPU's cache 256 softmaxes. On meta a look raises."""
    hidden = torch.empty(1024, 8, device="meta", requires_grad=True)
    weight = torch.empty(128_000, 8, device="meta")
    labels = torch.empty(1024, dtype=torch.int64, device="meta")
    with Counted() as counted:
        loss, _ = labelled_cross_entropy(hidden, weight, labels)
        loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert counted.softmaxes == 1  # 2**27 logits at once; on a CPU, whose caches are what counts, four chunks


def test_the_seam_is_torch_free_until_a_name_needs_it():
    code = "import sys, offsite.kernels as k; k.Report; k.Piece; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
