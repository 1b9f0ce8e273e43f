"""Encoders block by block, and healed by refit on pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from offsite.core.architectures import ARCHITECTURES
from offsite.core.images import load_processor, read_pictures
from offsite.core.load import load_model
from offsite.core.pictures import Pictures
from offsite.core.runtime import Runtime
from offsite.errors import UsageError
from offsite.exchange.artifacts import Base
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner
from tiny import VISION_KINDS, tiny_parties, tiny_pictures, tiny_vision_base

CPU = torch.device("cpu")


def blocks_of(model: Any) -> Any:
    row = ARCHITECTURES[model.config.model_type]
    return model.get_submodule(row.module_blocks or row.blocks)


def states(folder: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of a whole model."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    seen: list[torch.Tensor] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    with torch.no_grad():
        model(pixel_values=pixels)
    return seen


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_block_by_block_is_the_whole_model(tmp_path: Path, kind: str) -> None:
    base = tiny_vision_base(tmp_path / "base", kind, 3)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    runner = BlockRunner(open_base(Base(base)), Runtime(CPU, torch.float32))
    hidden = runner.load(0).embed(pixels)
    for index, expected in enumerate(states(base, pixels)):
        hidden = runner.load(index)(pixels, hidden)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_refit_brings_the_emulator_closer(tmp_path: Path, kind: str) -> None:
    """Also where a block scales what its MLP gives: the problem is then solved behind the scale."""
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base", kind, 6)
    own = tiny_pictures(tmp_path / "own", 16)
    processor = load_processor(base)
    pixels = torch.from_numpy(
        Pictures(read_pictures(tiny_pictures(tmp_path / "x", 4, seed=5)), processor).batch(range(12))
    )
    target = states(base, pixels)[4]  # before the top block
    errors = {}
    for heal in ("none", "refit"):
        out = tmp_path / heal
        packed(base, out, parties, keep=2, heal=heal, calibration=own, compute="fp32", device="cpu")
        found = states(out, pixels)[2]
        errors[heal] = float((found - target).norm() / target.norm())
    assert errors["refit"] < 0.9 * errors["none"], errors


def test_no_pictures_ship(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", blocks=4)
    with pytest.raises(UsageError, match="no calibration pictures ship") as caught:
        packed(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=1, heal="refit")
    assert "--calibration" in (caught.value.next_step or "")


@pytest.mark.parametrize(
    "settings",
    [
        {"select": "search"},
        {"select": "cluster"},
        {"heal": "distill"},
        {"heal": "share"},
        {"bits": 8},
        {"svd_rank": 0.5},
        {"mlp_width": 0.5},
        {"methods": ("bottleneck",)},
    ],
)
def test_what_is_for_language_models_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny_vision_base(tmp_path / "base", blocks=4)
    with pytest.raises(UsageError, match="language models alone"):
        packed(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=1, **settings)
    assert not (tmp_path / "bundle").exists()


def test_influence_and_pruning_work_on_pictures(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "dinov2", 5)
    own = tiny_pictures(tmp_path / "own", 4)
    bundle = packed(
        base, tmp_path / "bundle", tiny_parties(tmp_path), keep=2, select="influence", calibration=own, prune=0.3
    )
    assert bundle.manifest.methods == ("lora", "full", "bitfit")
    assert load_model(bundle.folder, dtype=torch.float32, device=CPU).config.num_hidden_layers == 4
