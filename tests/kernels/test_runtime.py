import os
from types import SimpleNamespace

import pytest
import torch

from offsite.errors import UsageError
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import Runtime, resolve_runtime, seeded, usual_tokens_at_once


def test_explicit_choices_are_kept():
    resolved = resolve_runtime("cpu", "fp32", threads=1)
    assert resolved.device == torch.device("cpu")
    assert resolved.dtype is torch.float32
    assert torch.get_num_threads() == 1
    assert resolve_runtime("cpu", "bf16", threads=1).dtype is torch.bfloat16


def test_auto_looks_at_what_the_processor_can_do(monkeypatch):
    for tiles, vectors, intel, expected in (
        (True, True, True, torch.bfloat16),
        (False, True, False, torch.bfloat16),
        (False, True, True, torch.float32),
        (False, False, False, torch.float32),
    ):
        monkeypatch.setattr("offsite.kernels.runtime.has_matrix_tiles", lambda able=tiles: able)
        monkeypatch.setattr("offsite.kernels.runtime.has_bf16_vectors", lambda able=vectors: able)
        monkeypatch.setattr("offsite.kernels.runtime.made_by_intel", lambda made=intel: made)
        assert resolve_runtime("cpu", "auto", threads=1).dtype is expected


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cuda:3") as caught:
        resolve_runtime("cuda:3", threads=1)
    assert "cpu" in str(caught.value)


def test_seeding_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(1, torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)


def test_compiled_products_are_kept_for_a_pass_and_not_for_every_shape(monkeypatch):
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(cache, "7")
    resolve_runtime("cpu", threads=1)
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"  # what the user says stays
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(cache)
    resolve_runtime("cpu", threads=1)
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("48", "1")


GIB = 2**30


@pytest.mark.parametrize(
    ("device", "dtype", "memory", "text", "expected"),
    [
        ("cpu", torch.bfloat16, 0, True, 1024),
        ("cpu", torch.float32, 0, True, 512),
        ("cpu", torch.float32, 0, False, 1024),
        ("mps", torch.float32, 0, False, 1024),
        ("cuda", torch.bfloat16, 8 * GIB, True, 1024),
        ("cuda", torch.bfloat16, 24 * GIB, True, 1024),
        ("cuda", torch.bfloat16, 80 * GIB, True, 4096),
        ("cuda", torch.float32, 80 * GIB, True, 2048),
        ("cuda:1", torch.bfloat16, 140 * GIB, True, 8192),
    ],
)
def test_how_much_runs_at_once_depends_on_the_device(monkeypatch, device, dtype, memory, text, expected):
    properties = SimpleNamespace(total_memory=memory)
    module = SimpleNamespace(get_device_properties=lambda of: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda of: module)
    assert usual_tokens_at_once(Runtime(torch.device(device), dtype), text=text) == expected


def test_each_of_several_processes_has_the_device_of_its_number(monkeypatch):
    chosen = []
    module = SimpleNamespace(device_count=lambda: 2, set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda of: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_runtime("auto", "fp32", 1, process=1).device == torch.device("cuda:1") == chosen[0]
    with pytest.raises(UsageError, match="no device for process 2"):
        resolve_runtime("cuda", "fp32", 1, process=2)
    with pytest.raises(UsageError, match="cannot share the device 'cuda:0'"):
        resolve_runtime("cuda:0", "fp32", 1, process=1)
    assert resolve_runtime("cpu", "fp32", 1, process=7).device == torch.device("cpu")


def test_memory_that_was_reserved_before_is_not_measured(monkeypatch):
    done = []
    for name, value in (("empty_cache", None), ("reset_peak_memory_stats", None), ("memory_allocated", 3)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name, value=value: done.append(name) or value)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert peak_memory(lambda: done.append("work"), torch.device("cuda")) == (3, 7)
    assert done == ["empty_cache", "reset_peak_memory_stats", "memory_allocated", "work"]
