"""The line that says how an emulator is made names everything that was done to the blocks."""

from typing import Any

import pytest

from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.describe_emulator import describe_emulator
from offsite.model_owner.partition import partition
from offsite.protocol.artifacts import Base
from tiny import MakeBase


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"keep": 2, "heal": "none"}, "llama: 2 of 4 blocks by uniform, not healed"),
        (
            {"prune": 0.3, "heal": "refit"},
            "llama: all 4 blocks, 30% of each matrix zero by sparsegpt, refit of mlp in closed form",
        ),
        ({"narrow": 0.5, "heal": "none"}, "llama: all 4 blocks, narrowed to 50% of the arithmetic by obs, not healed"),
        (
            {"narrow_heads": 0.5, "narrow_neurons": 0.25, "narrow_by": "energy", "heal": "none"},
            "llama: all 4 blocks, narrowed to 50% of the heads and 25% of the neurons by energy, not healed",
        ),
        (
            {"narrow_neurons": 0.25, "heal": "none"},
            "llama: all 4 blocks, narrowed to 25% of the neurons by obs, not healed",
        ),
        ({"bits": 4, "heal": "none"}, "llama: all 4 blocks, bits 4, not healed"),
    ],
)
def test_the_line(base_of: MakeBase, settings: dict[str, Any], line: str) -> None:
    model, spec = open_base(Base(base_of(blocks=6))), PackSpec(bottom=1, top=1, **settings)
    assert describe_emulator(model, partition(model, spec), spec) == line
