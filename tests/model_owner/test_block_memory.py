"""What a block ran on is gone when nobody holds it any more: not only once the garbage collector has come by."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner
from offsite.protocol.artifacts import Base


def test_a_hidden_state_is_freed_at_once(base_of: Callable[..., Path]) -> None:
    runner = BlockRunner(open_base(Base(base_of("llama"))), resolve_runtime("cpu", "fp32", 1))
    ids = torch.tensor([[1, 5, 9, 40]])
    block = runner.load(0)
    hidden = block.embed(ids)
    seen = weakref.ref(hidden)
    gc.disable()
    try:
        after = block(ids, hidden)
        assert after.shape == hidden.shape
        del hidden
        assert seen() is None
    finally:
        gc.enable()
