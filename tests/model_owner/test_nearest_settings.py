"""A combination that a family does not allow is refused before any work, with settings that work."""

import re
from pathlib import Path
from typing import Any

import pytest

from offsite.config import PackSpec
from offsite.config.emulator_methods import HEALING_STEPS, SELECTION_RULES
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.check_packing import require_packable
from offsite.protocol.artifacts import Base
from tiny import EVERY_KIND, EVERY_VISION_KIND, KINDS, tiny_base, tiny_vision_base

SPREAD = {"train": "0,2,5"}
SETTINGS: list[dict[str, Any]] = [
    *({"select": name} for name in SELECTION_RULES),
    *({"heal": name} for name in HEALING_STEPS),
    {"heal": "share,distill"},
    {"heal": "refit,distill", "distill_ce": 1.0},
    {"heal_minutes": 1},
    {"heal": "share,distill", "heal_minutes": 1},
    {"bits": 4},
    {"svd_rank": 0.5},
    {"mlp_width": 0.5},
    {"zeros": "left-out"},
    {"narrow": 0.5},
    {"narrow": 0.5, "narrow_widths": "budget"},
    {"narrow_heads": 0.5, "narrow_neurons": 0.5, "heal": "affine"},
    {"narrow_experts": 0.5},
    {"narrow_experts": 0.5, "narrow_heads": 0.5, "bits": 8},
    {"select": "search", "heal": "affine", "bits": 8},
    {"methods": ["bottleneck"]},
    {"refit_maps": "attention,mlp"},
    {"prune_by": "magnitude"},
    {"prune_by": "wanda"},
]


def applied(settings: dict[str, Any], next_step: str) -> dict[str, Any]:
    """Do as the next step of an error says: change the flags that it gives, remove those that it leaves out."""
    changed = dict(settings)
    given, _, without = next_step.partition("without ")
    changed |= dict(re.findall(r"--(select|heal) ([\w,]+)", given))
    removed = {word.removeprefix("--").replace("-", "_") for word in without.split(";")[0].split(" and ") if word}
    if left_out := re.search(r"leave ([\w -]+) out", next_step):
        removed |= {word.removeprefix("--").replace("-", "_") for word in left_out[1].split(" and ")}
    return {key: value for key, value in changed.items() if key not in removed}


def refusal(model: BaseModel, settings: dict[str, Any]) -> str | None:
    """The next step of the error that these settings lead to; None if there is none."""
    try:
        require_packable(model, PackSpec.model_validate(settings))
    except (IncompatibleError, UsageError) as error:
        return error.next_step or ""
    return None


@pytest.mark.parametrize("kind", [*EVERY_KIND, *EVERY_VISION_KIND])
def test_the_next_step_of_a_refusal_is_accepted(kind: str, tmp_path: Path) -> None:
    make = tiny_base if kind in KINDS else tiny_vision_base
    chosen: dict[str, Any] = KINDS.get(kind, {"kind": kind})
    model = open_base(Base(make(tmp_path / "base", blocks=8, **chosen)))
    refused = 0
    for split in ({}, SPREAD):
        for settings in SETTINGS:
            asked = {**split, **settings}
            while True:  # a combination may break several rules, one after the other
                next_step = refusal(model, asked)
                if next_step is None:
                    break
                refused += 1
                instead = applied(asked, next_step)
                assert instead != asked, (asked, next_step)
                asked = instead
    assert refused or kind in KINDS


@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt2 tied", "vit"])
def test_what_every_family_allows_is_not_refused(kind: str, tmp_path: Path) -> None:
    make = tiny_base if kind in KINDS else tiny_vision_base
    chosen: dict[str, Any] = KINDS.get(kind, {"kind": kind})
    model = open_base(Base(make(tmp_path / "base", blocks=8, **chosen)))
    for settings in (
        {},
        {"keep": 2},
        {"select": "influence"},
        {"select": "contiguous"},
        {"heal": "refit,distill"},
        {"heal": "refit", "refit_maps": "attention,mlp"},
        {"prune_by": "wanda"},
        {"prune_by": "magnitude"},
    ):
        require_packable(model, PackSpec.model_validate(settings))
