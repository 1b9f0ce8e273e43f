import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offsite.config import TuneSpec
from offsite.data.batches import collate
from offsite.data.examples import Example
from offsite.data_owner import feature_cache
from offsite.data_owner import tune as stage
from offsite.data_owner.feature_cache import _Skipped, cached_features
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning
from offsite.errors import StorageError, UsageError
from offsite.kernels.activation_checkpointing import checkpoint_activations, keep_activations
from offsite.kernels.cpu.fused_modules import fuse
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.models.torch_tensors import read_tensor
from offsite.progress import silent
from offsite.protocol.contents import ADAPTER_WEIGHTS
from offsite.storage.safetensors_files import read_header
from offsite.training.label_losses import label_losses
from offsite.training.master_weights import MasterWeights
from offsite.training.run_log import run_folder
from offsite.training.task import Batching
from tiny import KINDS, each_form, tiny_base, tiny_bundle, tiny_parties, tiny_rows

CPU = torch.device("cpu")
LENGTHS = (9, 14, 5, 14, 21, 2)
SPEC = TuneSpec(epochs=2, batch_size=4)


def tuning_of(folder, dtype=torch.float32, first=2):
    """A model of three blocks of which those from `first` on train."""
    model = load_model(folder, dtype=dtype, device=CPU)
    network = split_backbone_and_head(model)
    fuse(model)
    use_tiled_attention(model)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    trained = list(blocks)[first:]
    for block in trained:
        block.requires_grad_(True)
    weights = MasterWeights({f"{i}.{n}": p for i, b in enumerate(trained) for n, p in b.named_parameters()})
    generator = np.random.default_rng(0)
    examples = tuple(Example(i, generator.integers(0, 300, length), 1) for i, length in enumerate(LENGTHS))
    return Tuning(
        TextTask(network, examples, (), Batching.of(SPEC)), blocks, trained, weights, returned=weights.masters
    )


def calls_of(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def loss_and_gradients(tuning, examples):
    total, nats = label_losses(tuning.task.network, collate(examples))
    total.backward()
    tuning.weights.collect_gradients()
    gradients = {name: master.grad for name, master in tuning.weights.masters.items() if master.grad is not None}
    for master in tuning.weights.masters.values():
        master.grad = None
    return nats, gradients


FORMS = ("llama untied", "gpt2 tied", "falcon, one key head", "gemma2")  # one of each form of block


@pytest.mark.parametrize(
    ("kind", "again"),
    [*each_form(KINDS, "never"), *((kind, when) for kind in FORMS for when in ("before", "inside"))],
)
def test_losses_and_gradients_are_those_of_the_whole_network(tmp_path, kind, again):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]))
    picked = [tuning.task.examples[i] for i in (4, 0, 2)]
    nats, gradients = loss_and_gradients(tuning, picked)
    calls = [calls_of(block) for block in list(tuning.blocks)[:2]]
    if again == "before":
        checkpoint_activations(tuning.blocks)
    with cached_features(tuning, SPEC, tmp_path, silent) as piece:
        assert piece.count == 2
        assert json.loads((tmp_path / "features.json").read_text()) == {"cached": True}
        if again == "inside":
            checkpoint_activations(tuning.blocks)
        made = [len(seen) for seen in calls]
        found, slopes = loss_and_gradients(tuning, picked)
        assert [len(seen) for seen in calls] == made
        if again == "inside":
            keep_activations(tuning.blocks)
            assert [type(block) for block in tuning.blocks][:2] == [_Skipped] * 2
    torch.testing.assert_close(found, nats, rtol=1e-5, atol=1e-5)
    assert slopes.keys() == gradients.keys()
    assert gradients
    for name, slope in slopes.items():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(slope, gradients[name], rtol=1e-5, atol=1e-5 * max(1.0, scale))
    assert not any(isinstance(module, _Skipped) for module in tuning.task.network.body.modules())
    assert (tmp_path / "features.bin").stat().st_size == (sum(LENGTHS) - len(LENGTHS)) * 32 * 4


@pytest.mark.parametrize("kind", ["llama untied", "gpt2 tied"])
def test_bf16_is_kept_as_it_is(tmp_path, kind):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]), torch.bfloat16)
    nats, _ = loss_and_gradients(tuning, tuning.task.examples)
    with cached_features(tuning, SPEC, tmp_path, silent):
        found, _ = loss_and_gradients(tuning, tuning.task.examples)
    torch.testing.assert_close(found, nats, rtol=2e-2, atol=2e-2)
    assert (tmp_path / "features.bin").stat().st_size == (sum(LENGTHS) - len(LENGTHS)) * 32 * 2


def test_a_batch_with_an_unknown_row_runs_as_usual(tmp_path):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    stranger = Example(9, tuning.task.examples[0].ids[::-1].copy(), 1)
    calls = calls_of(next(iter(tuning.blocks)))
    mixed = [tuning.task.examples[0], stranger]
    _, expected = label_losses(tuning.task.network, collate(mixed))
    with cached_features(tuning, SPEC, tmp_path, silent):
        label_losses(tuning.task.network, collate(tuning.task.examples[:2]))  # what is known of it must not stay
        made = len(calls)
        _, found = label_losses(tuning.task.network, collate(mixed))
        assert len(calls) == made + 1
    assert torch.equal(found, expected)


def test_rows_that_repeat_are_kept_once(tmp_path):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    twice = Tuning(**{**vars(tuning), "task": replace(tuning.task, examples=tuning.task.examples * 2)})
    with cached_features(twice, SPEC, tmp_path, silent):
        pass
    assert (tmp_path / "features.bin").stat().st_size == (sum(LENGTHS) - len(LENGTHS)) * 32 * 4


@pytest.mark.parametrize(
    ("first", "settings", "reason"),
    [
        (0, {}, "the first block trains"),
        (2, {"cache_features": "off"}, "switched off by cache_features"),
        (2, {"epochs": 1}, "each row runs once"),
        (2, {"max_steps": 2}, "each row runs once"),
    ],
)
def test_nothing_is_kept_where_nothing_would_be_saved(tmp_path, first, settings, reason):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3), first=first)
    spec = SPEC.changed(settings)
    with cached_features(tuning, spec, tmp_path, silent) as piece:
        assert (piece.count, piece.reason) == (0, reason)
        assert not any(isinstance(block, _Skipped) for block in tuning.blocks)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


class Remembering(torch.nn.Module):
    """A block that leaves something behind for a later one, or takes it."""

    def __init__(self, block, memory, *, takes):
        super().__init__()
        self.block, self.memory, self.takes = block, memory, takes

    def forward(self, hidden, *arguments, **settings):
        if not self.takes:
            self.memory["left"] = hidden.sin()
            return self.block(hidden, *arguments, **settings)
        return self.block(hidden + self.memory["left"], *arguments, **settings)


def test_a_network_that_carries_more_than_the_hidden_state_is_not_cached(tmp_path):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    memory, events = {}, []
    tuning.task.network.body.register_forward_pre_hook(lambda *_: memory.update(left=torch.zeros(())))
    tuning.blocks[0] = Remembering(tuning.blocks[0], memory, takes=False)
    tuning.blocks[2] = Remembering(tuning.blocks[2], memory, takes=True)
    tuning = Tuning(**{**vars(tuning), "trained": [tuning.blocks[2]]})
    _, expected = label_losses(tuning.task.network, collate(tuning.task.examples))
    why = "what later blocks need is more than a hidden state"
    for reason in (why, "decided when the run began"):  # and what was decided stays
        with cached_features(tuning, SPEC, tmp_path, events.append) as piece:
            assert (piece.count, piece.reason) == (0, reason)
            _, found = label_losses(tuning.task.network, collate(tuning.task.examples))
        assert torch.equal(found, expected)
        assert not (tmp_path / "features.bin").exists()
    assert json.loads((tmp_path / "features.json").read_text()) == {"cached": False}
    assert [event.stage for event in events] == [f"frozen blocks run in every epoch: {why}"]


def test_without_room_nothing_is_cached_not_even_when_there_is_room_later(tmp_path, monkeypatch):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    events = []
    needed = (sum(LENGTHS) - len(LENGTHS)) * 32 * 4
    needed += 28 * sum(master.numel() for master in tuning.weights.masters.values())
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
        with cached_features(tuning, SPEC, tmp_path, events.append):
            assert not (tmp_path / "features.bin").exists()
    assert [event.stage for event in events] == ["frozen blocks run in every epoch: caching takes 1 MiB of disk"]
    with cached_features(tuning, SPEC, tmp_path, silent):
        assert not (tmp_path / "features.bin").exists()
    (tmp_path / "features.json").unlink()
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with cached_features(tuning, SPEC, tmp_path, silent):
        assert (tmp_path / "features.bin").exists()


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"cached": 2}', b"{"])
def test_a_damaged_record_is_named(tmp_path, content):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    (tmp_path / "features.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"features\.json"), cached_features(tuning, SPEC, tmp_path, silent):
        pass


def test_a_file_that_shrinks_is_named(tmp_path):
    tuning = tuning_of(tiny_base(tmp_path / "base", blocks=3))
    with cached_features(tuning, SPEC, tmp_path, silent):
        (tmp_path / "features.bin").write_bytes(b"")
        with pytest.raises(StorageError, match=r"features\.bin"):
            label_losses(tuning.task.network, collate(tuning.task.examples))


class House:
    """A bundle of which the last blocks train, and one with first ones; rows."""

    def __init__(self, folder):
        self.home = (parties := tiny_parties(folder)).data_owner
        self.rows = tiny_rows(folder / "rows.jsonl", 14)
        base = tiny_base(folder / "base", blocks=5)
        self.bundles = {
            bottom: tiny_bundle(base, folder / f"bundle-{bottom}", parties, bottom=bottom, top=2, keep=2)
            for bottom in (0, 1)
        }

    def tune(self, out, *, bottom=0, progress=silent, resume=False, **settings):
        chosen = {"rank": 4, "lr": 5e-3, "batch_size": 4, "epochs": 2, "compute": "fp32", "threads": 1, "device": "cpu"}
        spec = TuneSpec(**(chosen | settings))
        stage.tune(self.bundles[bottom], self.rows, out, spec, self.home, resume=resume, progress=progress)
        held = read_header(out / ADAPTER_WEIGHTS)
        return {name: read_tensor(tensor) for name, tensor in held.items()}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return House(tmp_path_factory.mktemp("house"))


@pytest.mark.parametrize("settings", [{}, {"memory": "64GiB"}, {"gradient_checkpointing": True}])
def test_a_return_is_nearly_the_one_without(house, tmp_path, settings):
    events = []
    cached = house.tune(tmp_path / "cached", progress=events.append, **settings)
    plain = house.tune(tmp_path / "plain", cache_features="off", **settings)
    assert any(event.stage.startswith("frozen blocks, once") for event in events)
    assert cached.keys() == plain.keys()
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-4)
    assert not run_folder(tmp_path / "cached").exists()


def test_frozen_blocks_run_no_more_often_with_more_epochs(house, tmp_path, monkeypatch):
    seen = []
    prepare = stage.prepare_model

    def counting(*given):
        tuning = prepare(*given)
        seen.append([calls_of(block) for block in tuning.blocks])
        return tuning

    monkeypatch.setattr(stage, "prepare_model", counting)
    for epochs in (2, 5):
        house.tune(tmp_path / str(epochs), epochs=epochs)
    few, many = ([len(calls) for calls in run] for run in seen)
    assert few[:2] == many[:2]
    assert many[2] - few[2] == many[3] - few[3] == 3 * 4  # steps of 3 epochs


def test_a_bundle_whose_first_block_trains_does_not_cache(house, tmp_path):
    events = []
    house.tune(tmp_path / "out", bottom=1, progress=events.append)
    assert not any("frozen" in event.stage for event in events)


@pytest.mark.parametrize("lost", [False, True])
def test_interrupted_and_resumed_is_bit_for_bit_the_same(house, tmp_path, lost):
    def stop(event):
        if event.stage == "tuning" and event.done == 5:
            raise KeyboardInterrupt

    settings = {"save_every": 2, "lora_dropout": 0.2}
    house.tune(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "parts", progress=stop, **settings)
    file = run_folder(tmp_path / "parts") / "features.bin"
    before = file.read_bytes()
    if lost:
        file.unlink()
    kept, events = [], []

    def watch(event):
        events.append(event)
        if event.stage == "tuning" and not kept:
            kept.append(file.read_bytes())

    with pytest.raises(UsageError, match="another one"):
        house.tune(tmp_path / "parts", resume=True, cache_features="off", **settings)
    house.tune(tmp_path / "parts", resume=True, progress=watch, **settings)
    assert kept == [before]
    assert any(event.stage.startswith("frozen blocks, once") for event in events) == lost
    assert (tmp_path / "whole" / ADAPTER_WEIGHTS).read_bytes() == (tmp_path / "parts" / ADAPTER_WEIGHTS).read_bytes()


def test_an_interruption_while_caching_leaves_no_half_file(house, tmp_path):
    def stop(event):
        if event.stage.startswith("frozen blocks, once"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        house.tune(tmp_path / "out", progress=stop)
    assert not run_folder(tmp_path / "out").exists()  # there is no resume point, so nothing stays
    house.tune(tmp_path / "out", resume=True)
