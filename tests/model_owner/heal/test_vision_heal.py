"""Encoders block by block, and healed by refit and distillation on pictures."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from artifacts import edit_weights, packed
from offsite.data.pictures.picture_files import load_processor
from offsite.data.pictures.picture_sets import read_pictures
from offsite.data.pictures.prepared_pictures import Pictures
from offsite.errors import UsageError
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration.calibration_pictures import PHOTOS, crops, photos
from offsite.model_owner.heal.distill import hidden_error
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from tiny import EVERY_VISION_KIND, tiny_parties, tiny_pictures, tiny_vision_base

CPU = torch.device("cpu")


def blocks_of(model: Any) -> Any:
    family = ARCHITECTURES[model.config.model_type]
    return model.get_submodule(family.module_blocks or family.blocks)


def states(folder: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each block of a whole model."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    seen: list[torch.Tensor] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    with torch.no_grad():
        model(pixel_values=pixels)
    return seen


def some_pixels(base: Path, folder: Path) -> torch.Tensor:
    """Twelve pictures that nothing was healed on, (12, 3, Y, X)."""
    pictures = Pictures(read_pictures(tiny_pictures(folder, 4, seed=5)), load_processor(base))
    return torch.from_numpy(pictures.batch(range(12)))


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_block_by_block_is_the_whole_model(tmp_path: Path, kind: str) -> None:
    base = tiny_vision_base(tmp_path / "base", kind, 3)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    runner = BlockRunner(open_base(Base(base)), Runtime(CPU, torch.float32))
    hidden = runner.load(0).embed(pixels)
    for index, expected in enumerate(states(base, pixels)):
        hidden = runner.load(index)(pixels, hidden)
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_refit_brings_the_emulator_closer(tmp_path: Path, kind: str) -> None:
    """Also where a block scales what its MLP gives: the problem is then solved behind the scale."""
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base", kind, 6)
    own = tiny_pictures(tmp_path / "own", 16)
    pixels = some_pixels(base, tmp_path / "x")
    target = states(base, pixels)[4]  # before the top block
    errors = {}
    for heal in ("none", "refit"):
        out = tmp_path / heal
        packed(base, out, parties, keep=2, heal=heal, calibration=own, compute="fp32", device="cpu")
        found = states(out, pixels)[2]
        errors[heal] = float((found - target).norm() / target.norm())
    assert errors["refit"] < 0.9 * errors["none"], errors


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_refit_of_attention_brings_the_emulator_closer(tmp_path: Path, kind: str) -> None:
    """Also where a block scales what its attention gives."""
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base", kind, 6)
    own = tiny_pictures(tmp_path / "own", 16)
    pixels = some_pixels(base, tmp_path / "x")
    target = states(base, pixels)[4]  # before the top block
    errors = []
    for maps in ({"heal": "none"}, {"refit_maps": "attention"}, {"refit_maps": "attention,mlp"}):
        out = tmp_path / str(len(errors))
        packed(base, out, parties, **{"keep": 2, "heal": "refit", "calibration": own, "compute": "fp32", **maps})
        errors.append(float((states(out, pixels)[2] - target).norm() / target.norm()))
    assert errors[2] < errors[1] < errors[0], errors


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_distillation_brings_the_emulator_closer(tmp_path: Path, kind: str) -> None:
    """On patch tokens; bottom, top and what is around the blocks stay, and a second run gives the same."""
    parties = tiny_parties(tmp_path)
    base = tiny_vision_base(tmp_path / "base", kind, 6)
    own = tiny_pictures(tmp_path / "own", 16)
    pixels = some_pixels(base, tmp_path / "x")
    target = states(base, pixels)[4]  # before the top block
    settings: dict[str, Any] = {
        "keep": 2, "calibration": own, "compute": "fp32", "dtype": "fp32", "device": "cpu", "threads": 1,
        "distill_steps": 40, "distill_lr": 3e-3, "distill_batch_tokens": 256,
    }  # fmt: skip
    plain = packed(base, tmp_path / "plain", parties, **(settings | {"heal": "none"}))
    twice = [packed(base, tmp_path / out, parties, **settings, heal="distill") for out in "ab"]
    errors = [float(hidden_error(states(one.folder, pixels)[2], target, 0)) for one in (plain, twice[0])]
    assert errors[1] < 0.9 * errors[0], errors
    family = ARCHITECTURES[plain.manifest.architecture]
    before, after, again = (open_checkpoint(one.folder).tensors for one in (plain, *twice))
    assert before.keys() == after.keys()
    for name in before:
        place = family.block_of(name)
        kept = bool((read_float32(before[name]) == read_float32(after[name])).all())
        assert bool((read_float32(after[name]) == read_float32(again[name])).all())
        if place is None or place[0] in plain.manifest.split.trained:
            assert kept, name
    assert not all((read_float32(before[name]) == read_float32(after[name])).all() for name in before)


def test_distillation_keeps_the_zeros_of_sparsegpt(tmp_path: Path) -> None:
    """At a rate that would move them far away from zero."""
    base, parties, own = tiny_vision_base(tmp_path / "base", "dinov2", 5), tiny_parties(tmp_path), tmp_path / "own"
    tiny_pictures(own, 8)
    settings: dict[str, Any] = {"prune": 0.5, "calibration": own, "distill_steps": 3, "distill_lr": 0.05}
    pruned, distilled = (
        packed(base, tmp_path / heal, parties, heal=heal, **settings) for heal in ("refit", "refit,distill")
    )
    family, before = ARCHITECTURES[pruned.manifest.architecture], open_checkpoint(pruned.folder).tensors
    for name, tensor in open_checkpoint(distilled.folder).tensors.items():
        place = family.block_of(name)
        if place and place[0] not in pruned.manifest.split.trained and len(tensor.shape) == 2:
            zeros = read_float32(before[name]) == 0
            assert zeros.any()
            assert (zeros == (read_float32(tensor) == 0)).all(), name


def test_distillation_moves_the_zeros_of_what_is_never_pruned(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "beit, relative positions", 3)
    table = "relative_position_bias_table"

    def clear(tensors: dict[str, Any]) -> None:
        tensors.update({name: values * 0 for name, values in tensors.items() if table in name})

    edit_weights(base / "model.safetensors", clear)
    bundle = packed(
        base, tmp_path / "out", tiny_parties(tmp_path), prune=0.5, heal="distill", distill_steps=2,
        calibration=tiny_pictures(tmp_path / "own", 4), distill_tokens=512,
    )  # fmt: skip
    held = {name: read_float32(tensor) for name, tensor in open_checkpoint(bundle.folder).tensors.items()}
    assert all(values.any() == (".1." in name) for name, values in held.items() if table in name)


def test_photos_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *by: None if name == "skimage" else find(name, *by))
    base = tiny_vision_base(tmp_path / "base", blocks=4)
    with pytest.raises(UsageError, match="scikit-image are not installed") as caught:
        packed(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=1, heal="refit")
    assert "[calibration-images]" in (caught.value.next_step or "")
    assert "--calibration" in (caught.value.next_step or "")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package with the photos' names lies; the folder of its data."""
    folder = tmp_path / "skimage" / "data"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in PHOTOS:
        Image.fromarray(draw.integers(0, 255, size=(40, 50, 3), dtype=np.uint8)).save(folder / name)
    spec = ModuleSpec("skimage", None, is_package=True)
    spec.submodule_search_locations = [str(folder.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return folder


def test_without_pictures_of_its_own(tmp_path: Path, installed: Path) -> None:
    """Crops of the photos that are installed, the same every time."""
    base, parties = tiny_vision_base(tmp_path / "base", "dinov2", 5), tiny_parties(tmp_path)
    made = [packed(base, tmp_path / out, parties, keep=2, heal="refit", calibration_tokens=512).folder for out in "ab"]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in made)
    assert first == second
    plain = packed(base, tmp_path / "plain", parties, keep=2, heal="none").folder
    assert first != (plain / "model.safetensors").read_bytes()
    assert {one.shape for one in crops(40, (16, 12))} == {(16, 12, 3)}
    assert len({one.tobytes() for one in crops(40, (16, 12))}) == 40


def test_a_package_without_the_photos(tmp_path: Path, installed: Path) -> None:
    (installed / "coffee.png").unlink()
    with pytest.raises(UsageError, match="does not hold the photos") as caught:
        photos()
    assert "coffee.png" in caught.value.reasons[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"select": "search"},
        {"select": "cluster"},
        {"heal": "distill", "distill_ce": 1.0},
        {"heal": "share"},
        {"heal": "affine"},
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


@pytest.mark.parametrize("settings", [{"heal": "refit"}, {"heal": "distill"}, {"select": "influence"}])
def test_timm_that_is_not_installed_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("offsite.model_owner.pack.fingerprint", lambda *_: pytest.fail("work was done"))
    base = tiny_vision_base(tmp_path / "base", "timm, eva", 4)
    with pytest.raises(UsageError, match="not installed") as caught:
        packed(base, tmp_path / "bundle", tiny_parties(tmp_path), keep=1, **settings)
    assert "[timm]" in (caught.value.next_step or "")


def test_influence_and_pruning_work_on_pictures(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", "dinov2", 5)
    own = tiny_pictures(tmp_path / "own", 4)
    bundle = packed(
        base, tmp_path / "bundle", tiny_parties(tmp_path), keep=2, select="influence", calibration=own, prune=0.3
    )
    assert bundle.manifest.methods == ("lora", "full", "bitfit")
    assert load_model(bundle.folder, dtype=torch.float32, device=CPU).config.num_hidden_layers == 4
