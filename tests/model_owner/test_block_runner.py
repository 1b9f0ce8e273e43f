"""Block by block is the same as all at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner, captured_inputs
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import Base
from tiny import EVERY_KIND, KINDS, MakeBase

IDS = torch.tensor([[1, 5, 9, 40, 77, 3, 200], [1, 301, 12, 12, 8, 90, 4]])
EXACT = Runtime(torch.device("cpu"), torch.float32)


def reference_states(base: Path) -> list[torch.Tensor]:
    """What enters block 0, and what leaves each block (before the final norm)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    blocks: Any = model.get_submodule(ARCHITECTURES[model.config.model_type].blocks)
    states: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    blocks[-1].register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states[:-1], hidden[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    return states


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_chain_of_blocks_is_the_model(base_of: MakeBase, kind: str) -> None:
    base = base_of(blocks=5, **KINDS[kind])
    model = open_base(Base(base))
    runner = BlockRunner(model, EXACT)
    expected = reference_states(base)
    hidden = runner.load(0).embed(IDS)
    torch.testing.assert_close(hidden, expected[0], rtol=1e-5, atol=1e-5)
    for index in range(5):
        hidden = runner.load(index)(IDS, hidden)
        torch.testing.assert_close(hidden, expected[index + 1], rtol=1e-5, atol=1e-5)


def test_a_stored_dtype_does_not_show(base_of: MakeBase) -> None:
    base = base_of(blocks=3, dtype="bf16")
    runner = BlockRunner(open_base(Base(base)), EXACT)
    hidden = runner.load(0).embed(IDS)
    for index in range(3):
        hidden = runner.load(index)(IDS, hidden)
    torch.testing.assert_close(hidden, reference_states(base)[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replaced_weights_and_captured_inputs(base_of: MakeBase, family: str) -> None:
    model = open_base(Base(base_of(family, 3)))
    family = model.family
    runner = BlockRunner(model, EXACT)
    hidden = runner.load(0).embed(IDS)
    plain = runner.load(1)
    with captured_inputs(plain, [family.mlp_out]) as seen:
        before = plain(IDS, hidden)
    (entered,) = seen.values()
    linear = plain.module.get_submodule(family.mlp_out)
    zero = {f"{family.mlp_out}.weight": torch.zeros_like(linear.weight)}
    after = runner.load(1, zero)(IDS, hidden)
    matrix = linear.weight if family.transposed else linear.weight.T
    torch.testing.assert_close(before - after, entered @ matrix, rtol=1e-4, atol=1e-4)
    plain(IDS, hidden + 1)
    assert seen[family.mlp_out] is entered  # the hook is off


def test_reduced_precision_is_near(base_of: MakeBase) -> None:
    base = base_of(blocks=3)
    runner = BlockRunner(open_base(Base(base)), Runtime(torch.device("cpu"), torch.bfloat16))
    hidden = runner.load(0).embed(IDS)
    assert hidden.dtype == torch.float32
    for index in range(3):
        hidden = runner.load(index)(IDS, hidden)
    expected = reference_states(base)[-1]
    assert hidden.dtype == torch.float32
    assert float((hidden - expected).norm() / expected.norm()) < 0.05
