"""Micro-batches side by side: the same numbers as one after the other."""

import threading

import numpy as np
import pytest
import torch

from offsite.config import TuneSpec
from offsite.data.examples import Example
from offsite.data_owner.memory_budget import side_by_side
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.kernels import checkpoint_activations, count_side_by_side, micro_batch_runner
from offsite.kernels.cpu.side_by_side import Lanes
from offsite.kernels.cpu.thread_dropout import drawn_seed
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.kernels.runtime import Runtime
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching
from tiny import EVERY_KIND, KINDS, tiny_base

CPU = torch.device("cpu")
WHERE = Runtime(CPU, torch.float32)
GROUPS = [[0, 3], [1], [4, 2], [5], [1, 5], [2]]


@pytest.fixture
def threads():
    """Sets how many compute; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tuning_of(folder):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    use_tiled_attention(model)  # as tuning does; torch's own draws dropout from the process's generator
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks.get_submodule("0").requires_grad_(True)
    weights = MasterWeights(dict(blocks.get_submodule("0").named_parameters()))
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate((9, 17, 30, 5, 12, 62))]
    trained = [blocks.get_submodule("0")]
    task = TextTask(split_backbone_and_head(model), examples, (), Batching.of(TuneSpec()))
    return Tuning(task, blocks, trained, weights, weights.masters)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("again", [False, True])
def test_side_by_side_and_one_after_the_other_are_the_same(tmp_path, threads, kind, again):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]))
    if again:
        checkpoint_activations(tuning.blocks)

    def step(count):
        threads(count)
        torch.manual_seed(0)
        for block in tuning.trained:
            block.train()  # GPT-2's, OPT's and BLOOM's have dropout there
        working, found = list(tuning.weights.working.values()), []
        with micro_batch_runner(working, CPU, count) as run:
            for loss in run(lambda group: tuning.task.loss(group, 0), GROUPS):
                found.append((loss, [parameter.grad for parameter in working]))
                for parameter in working:
                    parameter.grad = None
        return found

    expected, found = step(1), step(3)
    assert any(gradient is not None for gradient in expected[0][1])
    for (loss, gradients), (other, others) in zip(expected, found, strict=True):
        assert loss == other
        for one, two in zip(gradients, others, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_add_up_in_the_order_of_the_micro_batches(threads, count):
    """Sums of such numbers depend on the order; two parameters that autograd gives one tensor do not share it."""
    threads(count)
    one, two = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    factors, sums = [1e8, 1.0, -1e8, 3.0], []
    with micro_batch_runner([one, two], CPU, count) as run:
        for loss, factor in zip(
            run(lambda factor: ((one + two) * factor).sum() + factor, factors), factors, strict=True
        ):
            assert loss == factor
            sums.append(one.grad.clone())
    expected = torch.zeros(3)
    for factor, found in zip(factors, sums, strict=True):
        expected = expected + factor
        assert torch.equal(found, expected)
    one.grad.zero_()
    assert torch.equal(two.grad, expected)


def test_each_has_its_share_of_the_threads_and_what_is_left_over_has_all(threads):
    threads(4)
    meet = threading.Barrier(2, timeout=30)
    running, most = [0], []

    def work(number):
        alone = threading.current_thread() is threading.main_thread()
        if not alone:
            running[0] += 1
            meet.wait()  # fails unless two run at the same time
            most.append(running[0])
            meet.wait()
            running[0] -= 1
        return number, alone, torch.get_num_threads()

    with Lanes(2) as lanes:
        found = list(lanes(work, range(5)))
    assert found == [(number, number == 4, 4 if number == 4 else 2) for number in range(5)]
    assert max(most) == 2
    assert torch.get_num_threads() == 4
    fresh = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert fresh == [4]


def test_each_has_random_numbers_of_its_own_at_every_step():
    with Lanes(2) as lanes:
        drawn = [seed for _ in range(2) for seed in lanes.run_seeded(lambda _: drawn_seed(), range(5))]
    assert len(set(drawn)) == 10


def test_an_error_in_a_lane_is_an_error_here():
    def work(number):
        if number == 1:
            raise ValueError("one")
        return number

    with pytest.raises(ValueError, match="one"), Lanes(2) as lanes:
        list(lanes(work, range(4)))


def test_where_passes_would_disturb_one_another_there_is_one(tmp_path, threads, monkeypatch):
    threads(3)
    llama = tuning_of(tiny_base(tmp_path / "llama", blocks=3))
    state = torch.get_rng_state()
    assert side_by_side(llama, TuneSpec(lanes=3), WHERE).count == 3
    assert side_by_side(llama, TuneSpec(lanes=1), WHERE).count == 1
    assert side_by_side(llama, TuneSpec(lanes=3, tune_head=True), WHERE) == piece(
        1, "each would hold a gradient as large"
    )
    with_dropout = tuning_of(tiny_base(tmp_path / "gpt2", "gpt2", blocks=3))
    assert side_by_side(with_dropout, TuneSpec(lanes=3), WHERE).count == 3
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda given, *_, **__: given + torch.rand(()))
    assert side_by_side(with_dropout, TuneSpec(lanes=3), WHERE) == piece(1, "a block draws random numbers")
    assert torch.equal(state, torch.get_rng_state())
    next(module for module in llama.task.network.body.modules() if hasattr(module, "rope_type")).rope_type = "longrope"
    assert side_by_side(llama, TuneSpec(lanes=3), WHERE) == piece(1, "a long row changes the rotary embedding")


class piece:  # noqa: N801  compares as a Piece whose reason begins so
    def __init__(self, count, reason):
        self.count, self.reason = count, reason

    def __eq__(self, other):
        return other.count == self.count and other.reason.startswith(self.reason)

    __hash__ = None


def test_other_devices_run_one_after_the_other():
    body = torch.nn.Linear(2, 2, device="meta")
    assert count_side_by_side(body, torch.float32, asked=3, sample=body.forward) == piece(1, "one fills a meta device")


@pytest.mark.parametrize(
    ("tiles", "dtype", "count", "usual"),
    [(True, "bf16", 4, 2), (True, "bf16", 1, 1), (True, "fp32", 4, 1), (False, "bf16", 4, 1)],
)
def test_two_are_usual_on_matrix_tiles(tmp_path, threads, monkeypatch, tiles, dtype, count, usual):
    monkeypatch.setattr("offsite.kernels.cpu.side_by_side.has_tiles", lambda: tiles)
    threads(count)
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    where = Runtime(CPU, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    assert side_by_side(tuning, TuneSpec(), where).count == usual
