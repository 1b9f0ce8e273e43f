"""The arithmetic of tuning a bundle, held against the operations that torch counts in the loaded models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from artifacts import packed
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.tuning_arithmetic import TuningArithmetic
from offsite.models.loading import load_model
from tiny import MakeBase, Parties

BLOCKS, TOKENS = 5, 8
WAYS: dict[str, dict[str, Any]] = {
    "ends whole, dropped": {"bottom": 1, "top": 1, "keep": 1, "heal": "none"},
    "top, all kept": {"placement": "top", "bottom": None, "top": 2, "keep": 3, "heal": "none"},
    "every, narrower": {"placement": "every", "bottom": None, "top": None, "keep": None, "narrow": 0.6, "heal": "none"},
    "every, low rank": {"placement": "every", "bottom": None, "top": None, "keep": None, "svd_rank": 0.5},
    "affine": {"bottom": 1, "top": 1, "keep": 1, "heal": "affine"},
    "every, 4 bits": {"placement": "every", "bottom": None, "top": None, "keep": None, "bits": 4},
}


def linear_multiply_adds(folder: Path, lowest: int) -> tuple[int, int]:
    """The multiply-adds of the blocks' linear layers for one token, counted by torch: forward, and backward."""
    model: Any = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    blocks = model.model.layers
    ids = torch.zeros(1, TOKENS, dtype=torch.long)

    def counted(*, backward: bool) -> dict[str, int]:
        states = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(states, torch.arange(TOKENS)[None])
        with FlopCounterMode(display=False) as counter:
            for index, block in enumerate(blocks):
                if backward and index == lowest:
                    states = states.detach().requires_grad_()
                states = block(states, position_embeddings=rotary)
                states = states[0] if isinstance(states, tuple) else states
            if backward:
                states.sum().backward()
        return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}

    def linear(counts: dict[str, int]) -> int:
        return sum(count for name, count in counts.items() if "attention" not in name and "bmm" not in name)

    forward = linear(counted(backward=False))
    return forward // 2 // TOKENS, (linear(counted(backward=True)) - forward) // 2 // TOKENS


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_those_of_torch(base_of: MakeBase, tmp_path: Path, parties: Parties, way: str) -> None:
    base = base_of("llama", BLOCKS)
    bundle = packed(base, tmp_path / "bundle", parties, calibration_tokens=512, **WAYS[way])
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.arithmetic is not None
    lowest = min(bundle.manifest.split.trained)
    counted = linear_multiply_adds(bundle.folder, lowest)
    assert (issued.arithmetic.forward, issued.arithmetic.backward) == counted
    whole = linear_multiply_adds(base, 0)
    assert whole == (issued.arithmetic.base, issued.arithmetic.base)


def test_shares() -> None:
    counts = TuningArithmetic(forward=60, backward=20, verbatim=10, base=100, head=50)
    assert counts.share() == pytest.approx(0.4)
    assert counts.share(0.5) == pytest.approx((80 + 50) / (200 + 50))
    assert counts.share(whole_blocks=True) == pytest.approx(0.45)
