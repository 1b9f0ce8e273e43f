"""Selection rules: their exact results."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.partition import partition
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select import influence as influence_module
from offsite.model_owner.select.influence import block_influence, most_influential
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.model_owner.select.selection_protocol import Selection
from offsite.model_owner.select.uniform import uniform
from offsite.progress import Event, silent
from offsite.protocol.artifacts import Base
from tiny import MakeBase


@pytest.mark.parametrize(
    ("middle", "keep", "expected"),
    [
        (range(2, 28), 8, (2, 6, 9, 13, 16, 20, 23, 27)),  # SmolLM2-135M, 2-8-2
        (range(26), 13, (0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25)),
        (range(1, 11), 1, (1,)),
        (range(1, 11), 2, (1, 10)),
        (range(1, 4), 3, (1, 2, 3)),
        ((5,), 1, (5,)),
    ],
)
def test_uniform(middle: range, keep: int, expected: tuple[int, ...]) -> None:
    assert uniform(tuple(middle), keep) == expected


def test_uniform_is_the_formula_everywhere() -> None:
    """Middle index round(i(m-1)/(k-1)): as many as asked for, in order, the ends among them."""
    for m in range(1, 40):
        for k in range(2, m + 1):
            found = uniform(range(m), k)
            assert found == tuple(round(i * (m - 1) / (k - 1)) for i in range(k))
            assert len(set(found)) == k
            assert (found[0], found[-1]) == (0, m - 1)
            assert list(found) == sorted(found)


def test_most_influential() -> None:
    assert most_influential({3: 0.1, 4: 0.5, 5: 0.3, 6: 0.5}, 2) == (4, 6)
    assert most_influential({3: 0.2, 4: 0.2, 5: 0.2}, 2) == (3, 4)


def test_random_is_seeded(base_of: MakeBase) -> None:
    model = open_base(Base(base_of(blocks=10)))
    spec = PackSpec(bottom=1, top=1, keep=3, select="random", seed=5)
    found = select_blocks(model, partition(model, spec), spec, Path(), silent)
    assert found == select_blocks(model, partition(model, spec), spec, Path(), silent) == tuple(sorted(found))
    assert set(found) <= set(range(1, 9))
    others = {
        select_blocks(model, partition(model, spec), spec.changed({"seed": s}), Path(), silent) for s in range(20)
    }
    assert len(others) > 5


def test_everything_kept_needs_no_rule(base_of: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_base(Base(base_of(blocks=5)))
    monkeypatch.setattr(influence_module, "block_influence", None)
    spec = PackSpec(bottom=1, top=1, keep=3, select="influence")
    assert select_blocks(model, Sandwich((0,), (1, 2, 3), (4,)), spec, Path(), silent) == (1, 2, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_influence_is_what_transformers_computes(base_of: MakeBase, tmp_path: Path, family: str) -> None:
    base = base_of(family, 5)
    text = tmp_path / "calibration.txt"
    text.write_text("Two parties who do not trust each other tune one model. " * 60)
    model = open_base(Base(base))
    settings = {"bottom": 1, "top": 1, "keep": 2, "heal": "none", "compute": "fp32"}
    spec = PackSpec.model_validate({**settings, "calibration": text, "calibration_tokens": 512})
    events: list[Event] = []
    found = block_influence(Selection(model, Sandwich((0,), (1, 2, 3), (4,)), spec, Path(), events.append))
    assert sorted(found) == [1, 2, 3]
    assert events
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    states: list[list[torch.Tensor]] = [[] for _ in range(6)]

    def keep(index: int) -> Callable[..., None]:
        return lambda _, arguments, output: (
            states[index + 1].append(output[0] if isinstance(output, tuple) else output)
            or (states[0].append(arguments[0]) if index == 0 else None)
        )

    blocks = reference.get_submodule(model.family.blocks)
    for index, block in enumerate(blocks):
        block.register_forward_hook(keep(index))
    with torch.no_grad():
        for ids in calibration_batches(model, text, 512):
            reference(input_ids=ids, use_cache=False)
    for index in (1, 2, 3):
        cosines = [
            torch.cosine_similarity(before.double(), after.double(), dim=-1).flatten()
            for before, after in zip(states[index], states[index + 1], strict=True)
        ]
        assert found[index] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-5)
    chosen = select_blocks(model, partition(model, spec), spec.changed({"select": "influence"}), tmp_path, silent)
    assert chosen == most_influential(found, 2)
