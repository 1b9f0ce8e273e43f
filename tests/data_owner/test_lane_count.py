"""Micro-batches side by side: the same numbers as one after the other."""

import threading

import numpy as np
import pytest
import torch

from offsite.config import TuneSpec
from offsite.data.tokens import Example
from offsite.data_owner.lane_count import lane_count
from offsite.data_owner.plan import _lanes
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.data_owner.tune import tune
from offsite.kernels.activation_checkpointing import recompute
from offsite.kernels.cpu.side_by_side import Lanes
from offsite.kernels.cpu.thread_dropout import drawn_seed
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.kernels.runtime import Runtime
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.master_weights import TrainedWeights
from tiny import KINDS, tiny_base, tiny_house

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
    weights = TrainedWeights(dict(blocks.get_submodule("0").named_parameters()))
    generator = np.random.default_rng(0)
    examples = [Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate((9, 17, 30, 5, 12, 62))]
    trained = [blocks.get_submodule("0")]
    return Tuning(
        TextTask(split_backbone_and_head(model), examples, ()), blocks, trained, weights, frozenset(), weights.masters
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_side_by_side_and_one_after_the_other_are_the_same(tmp_path, threads, kind, again):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]))
    if again:
        recompute(tuning.blocks)

    def passed(group):
        total = tuning.task.loss(group, 0, 0)
        return float(total.detach()), tuning.weights.gradients(total)

    def step(count):
        threads(count)
        torch.manual_seed(0)
        for block in tuning.trained:
            block.train()  # GPT-2's, OPT's and BLOOM's have dropout there
        with Lanes(count) as lanes:
            return list(lanes.run_seeded(passed, GROUPS))

    expected, found = step(1), step(3)
    assert any(gradient is not None for gradient in expected[0][1])
    for (loss, gradients), (other, others) in zip(expected, found, strict=True):
        assert loss == other
        for one, two in zip(gradients, others, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)


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
        found = list(lanes.run(work, range(5)))
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
        list(lanes.run(work, range(4)))


def test_where_passes_would_get_in_each_others_way_there_is_one_lane(tmp_path, threads, monkeypatch):
    threads(3)
    llama = tuning_of(tiny_base(tmp_path / "llama", blocks=3))
    state = torch.get_rng_state()
    assert lane_count(llama, TuneSpec(lanes=3), WHERE) == 3
    assert lane_count(llama, TuneSpec(lanes=1), WHERE) == 1
    assert lane_count(llama, TuneSpec(lanes=3, tune_head=True), WHERE) == 1
    assert lane_count(llama, TuneSpec(lanes=3), Runtime(torch.device("meta"), torch.float32)) == 1
    with_dropout = tuning_of(tiny_base(tmp_path / "gpt2", "gpt2", blocks=3))
    assert lane_count(with_dropout, TuneSpec(lanes=3), WHERE) == 3
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda given, *_, **__: given + torch.rand(()))
    assert lane_count(with_dropout, TuneSpec(lanes=3), WHERE) == 1
    assert torch.equal(state, torch.get_rng_state())
    next(module for module in llama.task.network.body.modules() if hasattr(module, "rope_type")).rope_type = "longrope"
    assert lane_count(llama, TuneSpec(lanes=3), WHERE) == 1


@pytest.mark.parametrize(
    ("tiles", "dtype", "count", "usual"),
    [(True, "bf16", 4, 2), (True, "bf16", 1, 1), (True, "fp32", 4, 1), (False, "bf16", 4, 1)],
)
def test_lanes_are_usual_on_matrix_tiles(tmp_path, threads, monkeypatch, tiles, dtype, count, usual):
    monkeypatch.setattr("offsite.kernels.memory_formulas.has_tiles", lambda: tiles)
    threads(count)
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    where = Runtime(CPU, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    assert lane_count(tuning, TuneSpec(), where) == usual
    assert _lanes(TuneSpec(threads=count, compute=dtype)) == usual


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return tiny_house(tmp_path_factory.mktemp("house"), both={}, top={"bottom": 0})


def spec_of(**settings):
    usual = {"method": "full", "lr": 5e-3, "batch_size": 4, "epochs": 2, "compute": "fp32", "device": "cpu"}
    return TuneSpec(**(usual | {"micro_batch_tokens": 1} | settings))


@pytest.mark.parametrize("settings", [{}, {"method": "lora", "lora_dropout": 0.3}], ids=["full", "dropout"])
@pytest.mark.parametrize(
    "bundle", ["top", "both"]
)  # with none at the bottom, what enters the first trained block is kept
def test_the_return_is_the_same_after_an_interruption_too(house, tmp_path, threads, monkeypatch, bundle, settings):
    bundles, rows, home = house
    ran = []
    run = Lanes.run
    monkeypatch.setattr(Lanes, "run", lambda lanes, *given: ran.append(lanes.count) or run(lanes, *given))

    def stop(event):
        if event.stage == "tuning" and event.done == 3:
            raise KeyboardInterrupt

    def spec(count):
        return spec_of(threads=count, lanes=count, **settings)

    alone = tune(bundles[bundle], rows, tmp_path / "alone", spec(1), home)
    assert set(ran) == {1}
    ran.clear()
    whole = tune(bundles[bundle], rows, tmp_path / "whole", spec(2), home)
    with pytest.raises(KeyboardInterrupt):
        tune(bundles[bundle], rows, tmp_path / "parts", spec(2), home, progress=stop)
    parts = tune(bundles[bundle], rows, tmp_path / "parts", spec(2), home, resume=True)
    assert set(ran) == {2}
    weights = {path.read_bytes() for one in (alone, whole, parts) for path in one.folder.glob("*.safetensors")}
    assert len(weights) == 1
