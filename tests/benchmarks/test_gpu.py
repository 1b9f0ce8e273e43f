"""The benchmark for a card, run on the CPU with a tiny model."""

import pytest
import torch

from benchmarks import gpu
from offsite.errors import UsageError
from offsite.kernels.runtime import Runtime, resolve_runtime


def test_both_contestants_compute_the_same_and_are_measured():
    runtime = Runtime(torch.device("cpu"), torch.float32)
    result = gpu.compare(runtime, "tiny", rows=6, steps=2, turns=1)
    ours, peer = (result["contestants"][name] for name in ("offsite", "peft"))
    assert ours["first_loss"] == pytest.approx(peer["first_loss"], rel=1e-5)
    assert ours["last_loss"] == pytest.approx(peer["last_loss"], rel=1e-3)
    assert ours["last_loss"] < ours["first_loss"]
    assert ours["tokens_per_s"] > 0


def test_contestants_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(gpu, "add_lora", lambda model, add=gpu.add_lora: _louder(add(model)))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        gpu.compare(Runtime(torch.device("cpu"), torch.float32), "tiny", rows=2, steps=1, turns=1)


calls = []


def _louder(parameters):
    """Matrices that are not zero at the start, for the second contestant alone."""
    calls.append(1)
    if len(calls) == 2:
        for parameter in parameters.values():
            torch.nn.init.constant_(parameter, 0.5)
    return parameters


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="there is no device 'cuda' here"):
        resolve_runtime("cuda")
