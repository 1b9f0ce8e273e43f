"""Tuning with micro-batches side by side: the same return as with one after the other."""

import threading

import pytest
import torch

from offsite.config import TuneSpec
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.tune import tune
from tiny import tiny_house


@pytest.fixture
def threads():
    """As before afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return tiny_house(tmp_path_factory.mktemp("house"), both={}, top={"bottom": 0})


def spec_of(**settings):
    usual = {"method": "full", "lr": 5e-3, "batch_size": 4, "epochs": 2, "compute": "fp32", "device": "cpu"}
    return TuneSpec(**(usual | {"micro_batch_tokens": 1} | settings))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("settings", [{}, {"method": "lora", "lora_dropout": 0.3}], ids=["full", "dropout"])
@pytest.mark.parametrize(
    "bundle", ["top", "both"]
)  # with none at the bottom, what enters the first trained block is kept
def test_the_return_is_the_same_after_an_interruption_too(house, tmp_path, monkeypatch, bundle, settings):
    bundles, rows, home = house
    ran = set()
    loss = TextTask.loss
    monkeypatch.setattr(TextTask, "loss", lambda *given: ran.add(threading.current_thread()) or loss(*given))

    def stop(event):
        if event.stage == "tuning" and event.done == 3:
            raise KeyboardInterrupt

    def spec(count):
        return spec_of(threads=count, lanes=count, **settings)

    alone = tune(bundles[bundle], rows, tmp_path / "alone", spec(1), home)
    assert ran == {threading.main_thread()}
    ran.clear()
    whole = tune(bundles[bundle], rows, tmp_path / "whole", spec(2), home)
    with pytest.raises(KeyboardInterrupt):
        tune(bundles[bundle], rows, tmp_path / "parts", spec(2), home, progress=stop)
    parts = tune(bundles[bundle], rows, tmp_path / "parts", spec(2), home, resume=True)
    assert ran - {threading.main_thread()}
    weights = {path.read_bytes() for one in (alone, whole, parts) for path in one.folder.glob("*.safetensors")}
    assert len(weights) == 1
