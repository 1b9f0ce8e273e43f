"""What an accelerator has to wait for: nothing inside a step. On the meta device every look at a value raises."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.data_owner.text_task import TextTask
from offsite.kernels import micro_batch_runner, prepare
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.training.label_losses import label_losses
from offsite.training.loop import _accumulate
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching
from tiny import tiny_base

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTHS = (9, 5, 7, 30)


def task_on_meta(folder, family):
    """A model prepared as for a CUDA device, and rows of different lengths in micro-batches of one row."""
    model = load_model(tiny_base(folder / "base", family, 2), dtype=torch.float32, device=CPU)
    network = split_backbone_and_head(model)
    prepare(model, torch.device("cuda"), torch.float32)
    model.to(META).requires_grad_(True)
    examples = tuple(Example(i, np.arange(length) + 3, 2) for i, length in enumerate(LENGTHS))
    return model, TextTask(network, examples, (), Batching(rows=4, tokens=1, seed=0))


@pytest.fixture(autouse=True)
def _a_card_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_padded_batch_runs_forward_and_backward_without_a_look_at_a_value(tmp_path, family):
    model, task = task_on_meta(tmp_path, family)
    total, nats = label_losses(task.network, collate(task.examples))
    total.backward()
    assert nats.shape == (sum(length - 2 for length in LENGTHS),)
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_all_micro_batches_of_a_step_are_queued_before_the_first_look(tmp_path):
    model, task = task_on_meta(tmp_path, "llama")
    weights, ran = MasterWeights(dict(model.named_parameters())), []

    class Counted(TextTask):
        def loss_terms(self, rows, epoch):
            ran.append(list(rows))
            return super().loss_terms(rows, epoch)

    counted = Counted(**vars(task))
    with (
        micro_batch_runner(weights.working.values(), META) as run,
        pytest.raises((NotImplementedError, RuntimeError), match="meta"),
    ):
        _accumulate(counted, weights, run, 0, range(4), 1)
    assert sorted(map(tuple, ran)) == [(0,), (1,), (2,), (3,)]


def test_cached_states_are_found_without_a_look_at_the_device(tmp_path):
    from offsite.data_owner.feature_file import FeatureFile

    _, task = task_on_meta(tmp_path, "llama")
    features = FeatureFile(task.examples)
    features.width = 4
    features.write(tmp_path / "features", lambda batch: torch.zeros(*batch.ids.shape, 4), lambda event: None)
    with features.open(tmp_path / "features"):
        features.load_batch(collate(task.examples[:2]), META)
        assert features.states is not None
        assert (features.states.shape, features.states.device) == ((2, 8, 4), META)
        strange = replace(task.examples[0], ids=task.examples[0].ids[::-1].copy())
        features.load_batch(collate([strange]), META)
        assert features.states is None
