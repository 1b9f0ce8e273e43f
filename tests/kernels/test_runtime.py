import os

import pytest
import torch

from offsite.errors import UsageError
from offsite.kernels.runtime import resolve_runtime, seeded


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
