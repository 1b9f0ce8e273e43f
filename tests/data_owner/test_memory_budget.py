from dataclasses import replace

import numpy as np
import pytest
import torch

from offsite.config import TuneSpec
from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.data_owner import memory_budget
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.memory_trials import end_of_row, memory_trials
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import UsageError
from offsite.kernels.activation_checkpointing import Checkpointed, checkpoint_activations, keep_activations
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.progress import silent
from offsite.training.label_losses import label_losses
from offsite.training.master_weights import MasterWeights
from offsite.training.task import Batching
from tiny import EVERY_KIND, KINDS, tiny_base

CPU = torch.device("cpu")
WHERE = Runtime(CPU, torch.float32)


def _examples(lengths):
    generator = np.random.default_rng(0)
    return tuple(Example(i, generator.integers(0, 300, length), 2) for i, length in enumerate(lengths))


def _tuning(folder, lengths=(9, 14, 5, 14)):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks.get_submodule("0").requires_grad_(True)
    weights = MasterWeights(dict(blocks.get_submodule("0").named_parameters()))
    task = TextTask(split_backbone_and_head(model), _examples(lengths), (), Batching.of(TuneSpec()))
    trained = [blocks.get_submodule("0")]
    return Tuning(task, blocks, trained, weights, returned=weights.masters)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_recomputed_blocks_give_the_same_loss_and_gradients(tmp_path, kind):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]))
    batch = collate(tuning.task.examples)
    found = []
    for again in (False, True):
        (checkpoint_activations if again else keep_activations)(tuning.blocks)
        tuning.trained[0].train()  # GPT-2's, OPT's and BLOOM's have dropout there
        torch.manual_seed(0)
        total, _ = label_losses(tuning.task.network, batch)
        working = list(tuning.weights.working.values())
        found.append([float(total.detach()), *torch.autograd.grad(total, working, allow_unused=True)])
    assert all(isinstance(block, Checkpointed) for block in tuning.blocks)
    assert found[0][0] == found[1][0]
    for first, second in zip(found[0][1:], found[1][1:], strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


def _measuring(monkeypatch, tuning, *, per_token, recomputed):
    """A process that holds 100 MiB, and so many bytes a token while it works."""
    held = 100 * 2**20
    tokens = []
    run = memory_budget.run_trial

    def counted(tuning, trial, lanes):
        tokens.append(lanes * max(sum(len(trial.task.examples[i].ids) for i in group) for group in trial.micro_batches))
        run(tuning, trial, lanes)

    def measured(work, device):
        work()
        again = isinstance(next(iter(tuning.blocks)), Checkpointed)
        return held, held + tokens[-1] * (recomputed if again else per_token)

    monkeypatch.setattr(memory_budget, "run_trial", counted)
    monkeypatch.setattr(memory_budget, "peak_memory", measured)
    return tokens


@pytest.mark.parametrize(
    ("memory", "tokens", "again"),
    [("1300MiB", 4096, False), ("500MiB", 1024, False), ("280MiB", 256, False), ("180MiB", 4096, True)],
)
def test_as_much_runs_at_once_as_fits(tmp_path, monkeypatch, memory, tokens, again):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3), lengths=(32,) * 40)
    _measuring(monkeypatch, tuning, per_token=2**19, recomputed=2**14)
    spec = TuneSpec(memory=memory, micro_batch_tokens=4096, lanes=1, batch_size=64)
    fitted = within_memory(tuning, spec, WHERE, tmp_path / "memory.json", silent).spec
    assert (
        fitted.memory.micro_batch_tokens == tokens
    )  # a whole step fits: nothing bounds a micro-batch but the settings
    assert all(isinstance(block, Checkpointed) == again for block in tuning.blocks)
    assert all(master.grad is None for master in tuning.weights.masters.values())


@pytest.mark.parametrize(
    ("memory", "lanes", "tokens", "again"),
    [("1300MiB", 2, 512, False), ("280MiB", 1, 256, False), ("175MiB", 2, 512, True), ("146MiB", 1, 256, True)],
)
def test_lanes_go_before_blocks_are_recomputed(tmp_path, monkeypatch, memory, lanes, tokens, again):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3), lengths=(32,) * 40)
    _measuring(monkeypatch, tuning, per_token=2**19, recomputed=2**14)
    fitted, pieces = vars(
        within_memory(tuning, TuneSpec(memory=memory, lanes=2), WHERE, tmp_path / "memory.json", silent)
    ).values()
    assert [piece.count for piece in pieces] == [lanes, 3 * again]
    assert [("no room" in piece.reason) for piece in pieces] == [lanes == 1, again]
    assert (fitted.memory.lanes, fitted.memory.micro_batch_tokens) == (lanes, tokens)
    assert all(isinstance(block, Checkpointed) == again for block in tuning.blocks)


@pytest.mark.parametrize(
    ("memory", "tried", "again"),
    [
        ("700MiB", [256, 512, 1024], False),
        ("600MiB", [256, 512, 256, 512, 1024], True),  # the whole row would take 100 + 512 MiB, and AdamW
        ("300MiB", [256, 256, 512, 1024], True),
    ],
)
def test_a_long_row_is_tried_in_parts(tmp_path, monkeypatch, memory, tried, again):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3, max_position_embeddings=1024), (20, 1024))
    tokens = _measuring(monkeypatch, tuning, per_token=2**19, recomputed=2**14)
    fitted = within_memory(tuning, TuneSpec(memory=memory, lanes=1), WHERE, tmp_path / "memory.json", silent).spec
    assert tokens == tried  # and not the whole row where a part says that it does not fit
    assert fitted.memory.micro_batch_tokens == 1024
    assert all(isinstance(block, Checkpointed) == again for block in tuning.blocks)


def test_the_fullest_micro_batches_are_tried_as_they_will_run(tmp_path, monkeypatch):
    """Here 20 rows of 30 tokens, more than of the longest one, and a row that is nearly all labels."""
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3, max_position_embeddings=1024), (400, *[30] * 20, 300))
    task, ran, run = tuning.task, [], TextTask.loss
    given = (390, *[28] * 20, 1)
    rows = tuple(replace(row, given=first) for row, first in zip(task.examples, given, strict=True))
    spec = TuneSpec(batch_size=22, micro_batch_tokens=600)
    trials = list(memory_trials(replace(task, examples=rows), spec))
    assert [trial.tokens for trial in trials] == [256, 400, 600]
    assert [[sorted(group) for group in trial.micro_batches] for trial in trials[1:]] == [
        [[0], [21]],
        [list(range(1, 21)), [21]],
    ]
    assert trials[-1].at_once == 600
    task = replace(task, examples=rows, batching=Batching.of(spec))
    used = [sorted(group) for step in task.order(0) for group in task.micro_batches(step)]
    assert all(sorted(group) in used for group in trials[-1].micro_batches)
    monkeypatch.setattr(TextTask, "loss", lambda task, rows, *_: ran.append(tuple(rows)) or run(task, rows, 0))
    memory_budget.run_trial(tuning, trials[1], 1)
    assert ran == [(0,), (21,)]


def test_the_longest_row_is_tried_wherever_it_comes(tmp_path):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3), (20, 20, 50, 20, 20, 20))
    for seed in range(8):
        spec = TuneSpec(batch_size=1, micro_batch_tokens=40, seed=seed)
        trial = next(memory_trials(tuning.task, spec, steps=1))
        assert (trial.tokens, trial.micro_batches[0]) == (50, (2,))


def test_a_part_of_a_row_is_its_end_with_the_labels_there():
    row = Example(7, np.arange(10), 4)
    part = end_of_row(row, 8)
    assert (part.ids.tolist(), part.given) == (list(range(2, 10)), 2)
    assert end_of_row(row, 3).given == 1  # nothing predicts the first token
    part = end_of_row(Example(7, np.arange(10), 1, np.array([2, 5, 9])), 5)
    assert (part.ids.tolist(), part.labelled.tolist()) == (list(range(5, 10)), [4])


def test_a_resumed_run_keeps_what_was_found(tmp_path, monkeypatch):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3), lengths=(32,) * 40)
    trials = _measuring(monkeypatch, tuning, per_token=2**19, recomputed=2**14)
    spec = TuneSpec(memory="500MiB", micro_batch_tokens=4096)
    found = within_memory(tuning, spec, WHERE, tmp_path / "memory.json", silent)
    before = len(trials)
    assert within_memory(tuning, spec, WHERE, tmp_path / "memory.json", silent) == found
    assert len(trials) == before


@pytest.mark.parametrize("lengths", [(9, 14, 5, 14), (9, 600), (300, 300)])
def test_what_cannot_fit_is_refused_with_what_it_needs(tmp_path, monkeypatch, lengths):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3, max_position_embeddings=1024), lengths)
    _measuring(monkeypatch, tuning, per_token=2**24, recomputed=2**23)
    with pytest.raises(UsageError, match="does not fit into 120MiB") as refused:
        within_memory(tuning, TuneSpec(memory="120MiB"), WHERE, tmp_path / "memory.json", silent)
    needed = refused.value.next_step.split()[2]
    assert within_memory(tuning, TuneSpec(memory=needed), WHERE, tmp_path / "memory.json", silent)


def test_the_operating_system_is_asked():
    def work():
        torch.ones(2**27).sum()  # 512 MiB, of which the heap may still hold a part

    before, peak = peak_memory(work, CPU)
    assert 256 * 2**20 < peak - before < 2**30


def test_no_trial_is_charged_what_the_one_before_it_freed():
    resolve_runtime("cpu")  # has the heap keep what is freed
    _, first = peak_memory(lambda: torch.ones(2**27).sum(), CPU)
    _, second = peak_memory(lambda: None, CPU)
    assert first - second > 256 * 2**20


def test_checkpointing_goes_without_a_budget(tmp_path):
    tuning = _tuning(tiny_base(tmp_path / "base", blocks=3))
    spec = TuneSpec(gradient_checkpointing=True, lanes=1, micro_batch_tokens=1024)
    assert within_memory(tuning, spec, WHERE, tmp_path / "memory.json", silent).spec == spec
    assert all(isinstance(block, Checkpointed) for block in tuning.blocks)
