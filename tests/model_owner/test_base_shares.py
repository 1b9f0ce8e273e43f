"""How much of the base goes out: every parameter is counted once, by whole tensors."""

import math
from pathlib import Path
from typing import Any

import pytest

from artifacts import packed
from offsite.model_owner.base_shares import BaseShares
from offsite.model_owner.ledger import Ledger
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import MakeBase, Parties

BLOCKS, HIDDEN, INNER = 5, 32, 48
MLP_OUT, MLP, ATTENTION, NORMS = HIDDEN * INNER, 3 * HIDDEN * INNER, HIDDEN * (32 + 16 + 16 + 32), 2 * HIDDEN
BLOCK = MLP + ATTENTION + NORMS
ENDS = {"bottom": 1, "top": 1}
EVERY = {"bottom": None, "top": None, "placement": "every"}


@pytest.mark.parametrize(
    ("settings", "compressed", "not_sent"),
    [
        ({**ENDS, "keep": 3, "heal": "none"}, 0, 0),
        ({**ENDS, "keep": 1, "heal": "none"}, 0, 2 * BLOCK),
        ({**ENDS, "keep": 1, "heal": "share"}, 0, 2 * BLOCK),
        ({**ENDS, "keep": 1, "heal": "refit"}, MLP_OUT, 2 * BLOCK),
        ({**ENDS, "keep": None, "prune": 0.5, "prune_by": "magnitude"}, 3 * (MLP + ATTENTION), 0),
        ({**ENDS, "keep": None, "bits": 8}, 3 * (MLP + ATTENTION), 0),
        ({**EVERY, "keep": None, "bits": 4}, 5 * (MLP + ATTENTION), 0),
        ({**EVERY, "keep": None, "mlp_width": 0.5}, 5 * MLP, 0),
        ({**EVERY, "keep": 2, "svd_rank": 0.5}, 2 * (MLP + ATTENTION), 3 * BLOCK),
        ({**EVERY, "bottom": 1, "keep": None, "bits": 8}, 4 * (MLP + ATTENTION), 0),
    ],
)
def test_shares(
    base_of: MakeBase, tmp_path: Path, parties: Parties, settings: dict[str, Any], compressed: int, not_sent: int
) -> None:
    base = base_of("llama", BLOCKS)
    total = sum(math.prod(tensor.shape) for tensor in open_checkpoint(base).tensors.values())
    bundle = packed(base, tmp_path / "bundle", parties, calibration_tokens=256, **settings)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.shares == BaseShares(total - compressed - not_sent, compressed, not_sent)
    assert sum(issued.shares.fractions.values()) == pytest.approx(1)
    assert issued.shares.fractions["not_sent"] == pytest.approx(not_sent / total)
