"""Affine maps against an oracle that solves the same least squares, and what the bundle computes with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import offsite
from artifacts import edit_weights, hidden_states, packed
from offsite import Base, TuneSpec
from offsite.config import PackSpec, load_spec
from offsite.data_owner.plan import plan_tune
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.heal.ridge import USUAL_RIDGE
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import FAMILIES, KINDS, MakeBase, Parties, each_form, tiny_rows

CPU = torch.device("cpu")
BLOCKS = 8
KEPT = (1, 3, 6)  # what uniform selection keeps of the middle 1..6
IDS = torch.tensor([[1, *range(60, 120)], [1, *range(30, 90)]])
SETTINGS: dict[str, Any] = {"keep": 3, "heal": "affine", "calibration_tokens": 512, "compute": "fp32"}
SEVERAL = ["llama tied, grouped", "gpt2 tied", "gemma2", "opt, projections, norms behind"]


def kinds() -> list[str]:
    return [kind for kind, form in KINDS.items() if not ARCHITECTURES[form["family"]].experts]


def maps_of(bundle: Path) -> dict[str, torch.Tensor]:
    held = open_checkpoint(bundle).tensors
    return {name: torch.from_numpy(read_float32(tensor)) for name, tensor in held.items() if ".affine." in name}


@pytest.mark.parametrize("kind", SEVERAL)
def test_the_bundle_computes_h_plus_h_w_plus_b(base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, **SETTINGS)
    assert bundle.manifest.requires == ("affine",)
    maps, family = maps_of(bundle.folder), ARCHITECTURES[bundle.manifest.architecture]
    by_hand = load_model(base, dtype=torch.float32, device=CPU)
    blocks: Any = by_hand.get_submodule(family.blocks)
    for index in range(1, 7):
        place = KEPT.index(index) + 1 if index in KEPT else None

        def mapped(_: object, arguments: Any, output: Any, place: int | None = place) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if place is None:  # as if the block were not there
                hidden = arguments[0]
            else:
                weight, bias = (maps[family.in_block(place, f"affine.{name}")] for name in ("weight", "bias"))
                hidden = hidden + hidden @ weight + bias
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        blocks[index].register_forward_hook(mapped)
    with torch.no_grad():
        found = load_model(bundle.folder, dtype=torch.float32, device=CPU)(IDS).logits
        torch.testing.assert_close(found, by_hand(IDS, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SEVERAL)
def test_maps_are_the_ridge_solution_on_the_emulators_own_activations(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    (ids,) = calibration_batches(open_base(Base(base)), None, 512)  # one batch, so the ridge is the usual one
    bundle = packed(base, tmp_path / "bundle", parties, **SETTINGS)
    targets, maps = hidden_states(base, ids), maps_of(bundle.folder)
    family = ARCHITECTURES[bundle.manifest.architecture]
    emulator = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    seen: dict[int, torch.Tensor] = {}
    for place in range(1, 4):
        affine = emulator.get_submodule(family.in_block(place, "affine"))
        affine.register_forward_pre_hook(lambda _, a, place=place: seen.update({place: a[0].flatten(0, 1)}))
    with torch.no_grad():
        emulator(ids, use_cache=False)
    for place, following in enumerate((*KEPT[1:], 7), start=1):
        after, target = seen[place], targets[following].flatten(0, 1)
        root = target.norm(dim=1, keepdim=True).rsqrt().double()
        left = torch.cat([after, torch.ones(len(after), 1)], dim=1).double() * root
        penalty = USUAL_RIDGE * left.square().sum(0).mean()
        stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
        right = torch.cat([(target - after).double() * root, torch.zeros(left.shape[1], after.shape[1])])
        expected = torch.linalg.lstsq(stacked, right).solution.float()
        found = [maps[family.in_block(place, f"affine.{name}")] for name in ("weight", "bias")]
        assert found[0].abs().max() > 1e-2  # there was something to heal
        torch.testing.assert_close(torch.cat([found[0], found[1][None]]), expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("kind", each_form(kinds()))
def test_the_emulator_comes_closer_to_the_base_on_text_it_has_not_seen(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    healed = packed(base, tmp_path / "bundle", parties, **{**SETTINGS, "calibration_tokens": 16 * 8 * 64}).folder
    plain = packed(base, tmp_path / "plain", parties, keep=3).folder
    target = hidden_states(base, IDS)[7]
    error = {folder: float((hidden_states(folder, IDS)[4] - target).square().mean()) for folder in (healed, plain)}
    assert error[healed] < 0.9 * error[plain]


@pytest.mark.parametrize(
    "stored",
    [{"bits": 4}, {"svd_rank": 0.5}, {"mlp_width": 0.5}, {"prune": 0.5, "prune_by": "magnitude", "zeros": "left-out"}],
)
def test_maps_do_not_depend_on_how_the_blocks_are_stored(
    base_of: MakeBase, tmp_path: Path, parties: Parties, stored: dict[str, Any]
) -> None:
    base = base_of(blocks=BLOCKS)
    one, other = (
        packed(base, tmp_path / name, parties, **SETTINGS, **more) for name, more in (("a", {}), ("b", stored))
    )
    plain, beside = maps_of(one.folder), maps_of(other.folder)
    assert len(plain) == 6
    assert plain.keys() == beside.keys()
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"heal": "affine", "prune_by": "sparsegpt", "zeros": "left-out"},
            "prune_by = sparsegpt.*choose prune_by = magnitude",
        ),
        (
            {"heal": "affine", "keep": 2, "prune": 0.5, "prune_by": "sparsegpt"},
            "prune_by = sparsegpt.*choose prune_by = magnitude",
        ),
        ({"heal": "affine,refit", "keep": 2}, "heal's only step.*choose heal = affine"),
        ({"heal": "share,affine", "keep": 2}, "heal's only step.*choose heal = affine"),
        ({"heal": "affine,distill", "keep": 2}, "heal's only step.*or heal = refit,distill"),
    ],
)
def test_what_does_not_go_with_maps_is_no_setting(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_spec(PackSpec, settings)


def test_a_map_without_a_bias_is_told(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base_of(blocks=BLOCKS), tmp_path / "bundle", parties, **SETTINGS)

    def without(held: dict[str, Any]) -> None:
        del held["model.layers.2.affine.bias"]

    edit_weights(bundle.folder / DECLARED_WEIGHTS, without)
    with pytest.raises(IncompatibleError) as caught:
        load_model(bundle.folder, dtype=torch.float32, device=CPU)
    assert caught.value.reasons == ("missing tensor model.layers.2.affine.bias",)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"memory": "8GiB"}, {"cache_features": "off"}])
def test_tuning_does_not_notice(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, method: str, settings: dict[str, Any]
) -> None:
    bottom = 0 if "cache_features" in settings else 1  # without a bottom the maps are among the blocks that run once
    bundle = packed(base_of(family, BLOCKS), tmp_path / "bundle", parties, **SETTINGS, bottom=bottom)
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    usual = {"method": method, "max_steps": 4, "batch_size": 4, "rank": 2, "compute": "fp32", "threads": 1}
    found = []
    for name, more in (("one", {}), ("other", settings)):
        spec = TuneSpec.model_validate({**usual, "device": "cpu", "max_length": 64, **more})
        returned = offsite.tune(bundle, rows, tmp_path / name, spec, parties.data_owner)
        (file,) = returned.folder.glob("*.safetensors")
        held = {path: torch.from_numpy(read_float32(tensor)) for path, tensor in read_header(file).items()}
        assert not any("affine" in path for path in held)
        found.append(held)
    one, other = found
    assert one.keys() == other.keys()
    for path in one:
        # AdamW makes steps of one size of gradients near zero, so rounding shows
        torch.testing.assert_close(one[path], other[path], atol=1e-4, rtol=1e-3)


def test_the_plan_of_tuning_counts_the_maps(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base_of(blocks=BLOCKS), tmp_path / "bundle", parties, **SETTINGS)
    plain = packed(base_of(blocks=BLOCKS), tmp_path / "plain", parties, keep=3)
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    spec, home = TuneSpec(compute="fp32", device="cpu"), parties.data_owner
    mapped, other = (plan_tune(one, rows, tmp_path / "return", spec, home)[0] for one in (bundle, plain))
    parts = {part.name: part.parameters for part in mapped.bundle}
    assert parts["emulator"] == {part.name: part.parameters for part in other.bundle}["emulator"] + 3 * (32 * 32 + 32)
    held = open_checkpoint(bundle.folder).tensors.values()
    assert sum(parts.values()) == sum(math.prod(tensor.shape) for tensor in held)
    assert mapped.memory[0].bytes - other.memory[0].bytes == 3 * 4 * (32 * 32 + 32)
