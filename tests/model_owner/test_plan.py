"""The plan of packing: exact where it can be, and the formulas by hand on a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import lora_return, packed
from offsite.config import PackSpec, PlugInSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.kernels import memory_formulas
from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.intake import intake
from offsite.model_owner.pack import pack
from offsite.model_owner.plan import PackPlan, plan_pack, plan_plug_in
from offsite.model_owner.plug_in import plug_in
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from tiny import EVERY_KIND, EVERY_VISION_KIND, KINDS, MakeBase, Parties, tiny_pictures, tiny_vision_base

HIDDEN, INNER, VOCABULARY = 32, 48, 320
# q 32, k and v 16 each, o 32, three of the MLP, two norms
BLOCK = HIDDEN * (32 + 16 + 16 + 32) + 3 * HIDDEN * INNER + 2 * HIDDEN


def spec(**settings: Any) -> PackSpec:
    return PackSpec.model_validate({"bottom": 1, "top": 1, "keep": 2, "compute": "fp32", **settings})


def term(plan: PackPlan, phase: str, name: str) -> int:
    (found,) = (one for one in plan.phases if one.name == phase)
    return next(one.bytes for one in found.terms if one.name == name)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("heal", ["none", "refit", "affine"])
def test_the_bundle_has_the_planned_bytes(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, dtype: str, heal: str
) -> None:
    base = base_of(family)
    settings = spec(dtype=dtype, heal=heal, calibration_tokens=512)
    plan = plan_pack(Base(base), settings)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", settings, parties.owner)
    assert dict(plan.files) == {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
    assert plan.bundle_bytes == sum(file.stat().st_size for file in bundle.folder.iterdir())


def test_blocks_that_train_in_between_are_planned(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base, settings = Base(base_of("llama")), PackSpec(train=(0, 2, 4), keep=2, heal="none")  # type: ignore[arg-type]
    plan = plan_pack(base, settings)
    bundle = pack(base, tmp_path / "bundle", "hospital", settings, parties.owner)
    assert dict(plan.files) == {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
    parts = {part.name: part.blocks for part in plan.bundle if part.blocks}
    assert parts == {"bottom": 1, "emulator": 2, "trained in between": 1, "top": 1}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_model_can_be_planned(base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str) -> None:
    base = Base(base_of(**KINDS[kind]))
    plan = plan_pack(base, spec(heal="none"))
    bundle = pack(base, tmp_path / "bundle", "hospital", spec(heal="none"), parties.owner)
    assert dict(plan.files) == {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
    influence = plan_pack(base, spec(heal="none", select="influence"))
    assert influence.peak.bytes > plan.peak.bytes
    assert sum(part.parameters for part in plan.bundle if part.name in ("bottom", "top")) == sum(
        math.prod(entry.shape) for entry in bundle.manifest.tensors.values()
    )


def test_parts_by_hand(base_of: MakeBase) -> None:
    plan = plan_pack(Base(base_of("llama", tied=False)), spec())
    parts = {part.name: (part.blocks, part.parameters, part.bytes) for part in plan.bundle}
    vocabulary = parts["embeddings"][1] // HIDDEN
    assert parts == {
        "embeddings": (0, vocabulary * HIDDEN, 2 * vocabulary * HIDDEN),
        "bottom": (1, BLOCK, 2 * BLOCK),
        "emulator": (2, 2 * BLOCK, 4 * BLOCK),
        "top": (1, BLOCK, 2 * BLOCK),
        "final norm": (0, HIDDEN, 2 * HIDDEN),
        "head": (0, vocabulary * HIDDEN, 2 * vocabulary * HIDDEN),
    }
    assert [part.parameters for part in plan.base][2] == 3 * BLOCK
    assert [part.bytes for part in plan.base][2] == 12 * BLOCK  # the base is in fp32


def test_refit_by_hand(base_of: MakeBase) -> None:
    plan = plan_pack(Base(base_of("llama")), spec(calibration_tokens=4096))
    assert plan.calibration is not None
    assert (plan.calibration.sequences, plan.calibration.length) == (64, 64)  # the context is 64
    assert plan.compute == "fp32"
    running, summing, solving, _ = (phase.name for phase in plan.phases)
    assert term(plan, running, "hidden states, base and emulator") == 2 * 4 * 4096 * HIDDEN
    assert term(plan, running, "one block in fp32") == 4 * BLOCK
    batch, projected = 8 * 64, 32 + 16 + 16 + 2 * INNER
    forward = 4 * (projected + 32 + INNER) + 8 * HIDDEN
    assert term(plan, running, "activations of one batch") == batch * forward
    assert term(plan, summing, "sums of squares, fitted and held out") == 8 * (INNER**2 + INNER * HIDDEN)
    assert term(plan, summing, "features of one batch, plain and weighted") == 8 * batch * INNER
    assert term(plan, solving, "system and factor in fp64") == 16 * INNER**2
    assert {one.name: one.bytes for one in plan.disk}["healed weights, until the bundle is written"] == (
        2 * 2 * INNER * HIDDEN
    )


def test_refit_of_both_maps_by_hand(base_of: MakeBase) -> None:
    base = Base(base_of("llama", head_dim=12))
    attended = 4 * 12
    plan = plan_pack(base, spec(refit_maps="attention,mlp,attention", calibration_tokens=4096))
    _, *solved, _ = (phase.name for phase in plan.phases)
    assert solved == [
        "summing up an attention's projection's problem",
        "solving for an attention's projection",
        "summing up a projection's problem",
        "solving for a projection",
    ]
    assert term(plan, solved[0], "sums of squares, fitted and held out") == 8 * (attended**2 + attended * HIDDEN)
    assert term(plan, solved[1], "system and factor in fp64") == 16 * attended**2
    assert term(plan, solved[3], "system and factor in fp64") == 16 * INNER**2
    assert {one.name: one.bytes for one in plan.disk}["healed weights, until the bundle is written"] == (
        2 * 2 * (attended + INNER) * HIDDEN
    )


def test_affine_maps_by_hand(base_of: MakeBase) -> None:
    plan = plan_pack(Base(base_of("llama")), spec(heal="affine", calibration_tokens=4096))
    running, summing, solving, _ = (phase.name for phase in plan.phases)
    behind = HIDDEN**2 + HIDDEN
    assert term(plan, running, "hidden states, base and emulator") == 2 * 4 * 4096 * HIDDEN
    assert term(plan, running, "the map behind it") == 4 * behind
    assert term(plan, summing, "sums of squares, fitted and held out") == 8 * 2 * HIDDEN**2
    assert term(plan, summing, "features of one batch, plain and weighted") == 8 * 8 * 64 * HIDDEN
    assert term(plan, solving, "system and factor in fp64") == 16 * HIDDEN**2
    assert {one.name: one.bytes for one in plan.disk}["healed weights, until the bundle is written"] == 2 * 2 * behind
    parts = {part.name: (part.blocks, part.parameters, part.bytes) for part in plan.bundle}
    assert parts["emulator"] == (2, 2 * (BLOCK + behind), 2 * 2 * (BLOCK + behind))


def test_pruning_by_hand(base_of: MakeBase) -> None:
    plan = plan_pack(Base(base_of("llama")), spec(keep=3, prune=0.5, calibration_tokens=4096))
    running, pruning, *_ = (phase.name for phase in plan.phases)
    assert term(plan, running, "hidden states, base and emulator") == 2 * 4 * 4096 * HIDDEN
    assert term(plan, pruning, "sums of squares, at most one for each map") == 4 * 6 * HIDDEN**2
    assert {one.name: one.bytes for one in plan.disk}["healed weights, until the bundle is written"] == (
        3 * 2 * (BLOCK - 2 * HIDDEN)  # all but the norms
    )


def test_without_a_gap_no_network_runs(base_of: MakeBase) -> None:
    for settings in (spec(heal="none"), spec(keep=3, select="influence")):
        plan = plan_pack(Base(base_of("llama")), settings)
        assert plan.calibration is None
        assert plan.compute is None
        assert [phase.name for phase in plan.phases] == ["writing the bundle"]
        assert plan.peak.terms[0].bytes == memory_formulas.PLAIN_LIBRARIES


def test_influence_alone_keeps_one_set_of_hidden_states(base_of: MakeBase) -> None:
    plan = plan_pack(Base(base_of("llama")), spec(select="influence", heal="none", calibration_tokens=4096))
    running, writing = plan.phases
    assert term(plan, running.name, "hidden states") == 4 * 4096 * HIDDEN
    assert writing.name == "writing the bundle"


def test_what_cannot_be_packed_cannot_be_planned(base_of: MakeBase) -> None:
    with pytest.raises(UsageError, match="cannot keep 4 blocks"):
        plan_pack(Base(base_of("llama")), spec(keep=4))


@pytest.mark.parametrize("compute", ["auto", "bf16", "fp32"])
def test_the_arithmetic_is_foreseen(compute: Any) -> None:
    assert memory_formulas.compute_bytes(compute, "cpu") == resolve_runtime("cpu", compute, 1).dtype.itemsize


@pytest.mark.parametrize(("form", "more"), [("adapter", ()), ("merged", ("tokenizer.json",))])
def test_plugging_in(base_of: MakeBase, tmp_path: Path, parties: Parties, form: Any, more: tuple[str, ...]) -> None:
    base = base_of("llama")
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    settings = PlugInSpec.model_validate({"as": form})
    plan = plan_plug_in(Base(base), returned.folder, settings, parties.owner)
    assert plan.form == form
    assert plan.changed == 2 * 7
    assert plan.changed_parameters == 2 * (BLOCK - 2 * HIDDEN)  # every linear map of two blocks
    if form == "merged":  # smaller than a chunk that is copied, so by hand: the largest map is 32 x 48
        assert {term.name: term.bytes for term in plan.phases[1].terms}.keys() >= {"copy buffer"}
    made = plug_in(Base(base), intake(returned.folder, parties.owner), tmp_path / "plugged", settings, parties.owner)
    assert plan.disk_bytes >= 0.9 * sum(file.stat().st_size for file in made.folder.iterdir())
    assert all((made.folder / name).is_file() for name in more)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_every_kind_of_encoder_can_be_planned(tmp_path: Path, parties: Parties, kind: str) -> None:
    base, own = Base(tiny_vision_base(tmp_path / "base", kind, 4)), tiny_pictures(tmp_path / "own", 3)
    settings = spec(keep=1, heal="refit", calibration=own)
    plan = plan_pack(base, settings)
    bundle = pack(base, tmp_path / "bundle", "hospital", settings, parties.owner)
    assert dict(plan.files) == {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
    assert plan.calibration is not None
    assert plan.calibration.sequences == 9
    assert term(plan, "running the blocks", "prepared pictures") == 9 * 4 * 3 * 16 * 16
    config = json.loads((base.folder / "config.json").read_text())
    with torch.no_grad():
        model = load_model(base.folder, dtype=torch.float32, device=torch.device("cpu"))
        seen = model(pixel_values=torch.zeros(1, 3, 16, 16))
    tokens = seen.last_hidden_state.shape[1]
    assert plan.calibration.length == tokens
    hidden = 2 * 4 * 9 * tokens * config["hidden_size"]
    assert term(plan, "running the blocks", "hidden states, base and emulator") == hidden


def test_an_encoder_whose_processor_says_no_size_cannot_be_planned(tmp_path: Path) -> None:
    base = tiny_vision_base(tmp_path / "base", blocks=4)
    file = base / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"shortest_edge": 16}}))
    with pytest.raises(IncompatibleError, match="does not say how large") as caught:
        plan_pack(Base(base), spec(keep=1, calibration=tiny_pictures(tmp_path / "own", 1)))
    assert "'height'" in caught.value.reasons[0]
