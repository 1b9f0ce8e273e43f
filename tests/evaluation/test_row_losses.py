"""The loss of every row, passes side by side."""

import threading

import numpy as np
import pytest
import torch

from offsite.data.examples import Example
from offsite.evaluation.row_losses import row_losses
from offsite.kernels import forward_runner
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from tiny import tiny_base


@pytest.mark.parametrize("count", [2, 3])
def test_side_by_side_they_are_the_same_and_leave_nothing_behind(tmp_path, monkeypatch, count):
    model = load_model(tiny_base(tmp_path / "base", blocks=2), dtype=torch.float32, device=torch.device("cpu"))
    network = split_backbone_and_head(model.eval())
    network.body.requires_grad_(True)
    generator = np.random.default_rng(0)
    lengths = (9, 17, 30, 5, 12, 62, 8)
    examples = [Example(i, generator.integers(0, 300, length), i % 3 + 1) for i, length in enumerate(lengths)]
    told, ran = [], []
    network.body.register_forward_hook(lambda *_: ran.append((threading.current_thread(), torch.is_grad_enabled())))
    expected = row_losses(network, examples, 40)
    assert {thread for thread, _ in ran} == {threading.main_thread()}
    ran.clear()
    monkeypatch.setattr("offsite.kernels.cpu.side_by_side.usual_lanes", lambda threads, item: count)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    found = row_losses(network, examples, 40, told.append)
    assert [(row.line, row.tokens) for row in found] == [(row.line, row.tokens) for row in expected]
    assert [row.nats for row in found] == pytest.approx([row.nats for row in expected], rel=1e-5)
    assert {grad for _, grad in ran} == {False}
    assert len({thread for thread, _ in ran} - {threading.main_thread()}) > 1
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert [event.done for event in told] == sorted(event.done for event in told)
    assert told[-1].done == len(examples)


@pytest.mark.parametrize(
    ("tiles", "dtype", "rope", "count"),
    [
        (True, "bfloat16", "default", 2),
        (True, "bfloat16", "longrope", 1),
        (True, "float32", "default", 1),
        (False, "bfloat16", "default", 1),
    ],
)
def test_passes_run_side_by_side_where_training_would(tmp_path, monkeypatch, tiles, dtype, rope, count):
    monkeypatch.setattr("offsite.kernels.cpu.side_by_side.has_tiles", lambda: tiles)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = load_model(tiny_base(tmp_path / "base", blocks=2), dtype=getattr(torch, dtype), device=torch.device("cpu"))
    next(part for part in model.modules() if hasattr(part, "rope_type")).rope_type = rope
    with forward_runner(model.base_model) as run:
        assert run.count == count
