"""Plans of packing and plugging in: sizes are the run's, what it refuses they refuse, and measuring leaves nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import full_return, lora_return, packed
from offsite.config import PackSpec, PlugInSpec
from offsite.errors import OffsiteError, UsageError
from offsite.model_owner.check_packing import identity_of_packing
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.measure_packing import measure_packing
from offsite.model_owner.pack import pack
from offsite.model_owner.plan import PackPlan, plan_pack
from offsite.model_owner.plugging_in.plan_plug_in import plan_plug_in
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.models.plan_amounts import Amount
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.protocol.home import Home
from offsite.training.run_log import run_folder
from tiny import EVERY_KIND, EVERY_VISION_KIND, KINDS, Parties, tiny_base, tiny_pictures, tiny_vision_base

MakeBase = Callable[..., Path]
HIDDEN, INNER = 32, 48
# q 32, k and v 16 each, o 32, three of the MLP, two norms
BLOCK = HIDDEN * (32 + 16 + 16 + 32) + 3 * HIDDEN * INNER + 2 * HIDDEN
ROOM = "healed weights, until the bundle is written"


def spec(**settings: Any) -> PackSpec:
    return PackSpec.model_validate({"bottom": 1, "top": 1, "keep": 2, "compute": "fp32", "device": "cpu", **settings})


@pytest.fixture
def plan_of(tmp_path: Path, parties: Parties) -> Callable[..., PackPlan]:
    def plan(base: Path, settings: PackSpec) -> PackPlan:
        return plan_pack(Base(base), tmp_path / "planned", "hospital", settings, parties.owner)[0]

    return plan


Plan = Callable[..., PackPlan]


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def by_name(amounts: tuple[Amount, ...]) -> dict[str, int]:
    return {amount.name: amount.bytes for amount in amounts}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("heal", ["none", "refit", "affine"])
def test_the_bundle_has_the_planned_bytes(
    base_of: MakeBase, tmp_path: Path, parties: Parties, plan_of: Plan, family: str, dtype: str, heal: str
) -> None:
    base, settings = base_of(family), spec(dtype=dtype, heal=heal, calibration_tokens=512)
    plan = plan_of(base, settings)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", settings, parties.owner)
    assert by_name(plan.files) == sizes(bundle.folder)
    assert by_name(plan.disk)["bundle"] == sum(sizes(bundle.folder).values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{"bits": 8}, {"keep": 2, "heal": "share"}, {"mlp_width": 0.5, "top": 1}])
def test_adapters_on_compressed_blocks_are_planned(
    base_of: MakeBase, tmp_path: Path, parties: Parties, plan_of: Plan, family: str, settings: dict[str, Any]
) -> None:
    base, every = base_of(family), PackSpec.model_validate({"placement": "every", **settings})
    plan = plan_of(base, every)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", every, parties.owner)
    assert by_name(plan.files) == sizes(bundle.folder)
    parts = {part.name: part.blocks for part in plan.bundle if part.blocks}
    assert parts == ({"emulator": 5} if "top" not in settings else {"emulator": 4, "top": 1})
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    plugged = plan_plug_in(Base(base), returned.folder, tmp_path / "plugged", PlugInSpec(), parties.owner)
    made = plug_in(
        Base(base), intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    assert by_name(plugged.files) == sizes(made.folder)


def test_blocks_that_train_in_between_are_planned(
    base_of: MakeBase, tmp_path: Path, parties: Parties, plan_of: Plan
) -> None:
    base, settings = base_of("llama"), PackSpec(train=(0, 2, 4), keep=2, heal="none")
    plan = plan_of(base, settings)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", settings, parties.owner)
    assert by_name(plan.files) == sizes(bundle.folder)
    parts = {part.name: part.blocks for part in plan.bundle if part.blocks}
    assert parts == {"bottom": 1, "emulator": 2, "trained in between": 1, "top": 1}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_model_can_be_planned(
    base_of: MakeBase, tmp_path: Path, parties: Parties, plan_of: Plan, kind: str
) -> None:
    base = base_of(**KINDS[kind])
    plan = plan_of(base, spec(heal="none"))
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", spec(heal="none"), parties.owner)
    assert by_name(plan.files) == sizes(bundle.folder)
    assert plan.memory == ()
    influence = plan_of(base, spec(heal="none", select="influence"))
    assert influence.work == ("select by influence",)
    assert influence.memory[0].bytes > 0
    assert sum(part.parameters for part in plan.bundle if part.name in ("bottom", "top")) == sum(
        math.prod(entry.shape) for entry in bundle.manifest.tensors.values()
    )


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_every_kind_of_encoder_can_be_planned(tmp_path: Path, parties: Parties, plan_of: Plan, kind: str) -> None:
    base, own = tiny_vision_base(tmp_path / "base", kind, 4), tiny_pictures(tmp_path / "own", 3)
    settings = spec(keep=1, heal="refit", calibration=own)
    plan = plan_of(base, settings)
    bundle = pack(Base(base), tmp_path / "bundle", "hospital", settings, parties.owner)
    assert by_name(plan.files) == sizes(bundle.folder)
    assert plan.work == ("heal by refit of mlp in closed form",)


def test_parts_by_hand(base_of: MakeBase, plan_of: Plan) -> None:
    plan = plan_of(base_of("llama", tied=False), spec())
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


@pytest.mark.parametrize(
    ("settings", "work", "healed"),
    [
        ({}, ("heal by refit of mlp in closed form",), 2 * 2 * INNER * HIDDEN),
        (
            {"refit_maps": "attention,mlp"},
            ("heal by refit of attention in closed form and mlp in closed form",),
            2 * 2 * (32 + INNER) * HIDDEN,
        ),
        ({"heal": "affine"}, ("heal by affine",), 2 * 2 * (HIDDEN**2 + HIDDEN)),
        (
            {"keep": 3, "prune": 0.5},
            ("prune by sparsegpt", "heal by refit of mlp in closed form"),
            3 * 2 * (BLOCK - 2 * HIDDEN),
        ),
        ({"heal": "none"}, (), None),
    ],
    ids=["refit", "both maps", "affine", "pruning", "none"],
)
def test_what_runs_and_what_lies_on_the_disk(
    base_of: MakeBase, plan_of: Plan, settings: dict[str, Any], work: tuple[str, ...], healed: int | None
) -> None:
    plan = plan_of(base_of("llama"), spec(**settings))
    assert plan.work == work
    assert by_name(plan.disk).get(ROOM) == healed
    assert plan.disk_bytes == sum(by_name(plan.disk).values())


def test_affine_maps_are_parameters_of_the_bundle(base_of: MakeBase, plan_of: Plan) -> None:
    parts = {part.name: part.parameters for part in plan_of(base_of("llama"), spec(heal="affine")).bundle}
    assert parts["emulator"] == 2 * (BLOCK + HIDDEN**2 + HIDDEN)


def test_the_dtype_that_the_device_decides_is_not_guessed(base_of: MakeBase, plan_of: Plan) -> None:
    base = base_of("llama")
    for device, compute, expected in (
        ("auto", "auto", ["bf16", "fp32"]),
        ("cuda", "auto", ["bf16", "fp32"]),
        ("mps", "auto", ["fp32"]),
        ("auto", "fp32", ["fp32"]),
        ("cuda", "bf16", ["bf16"]),
    ):
        plan = plan_of(base, spec(device=device, compute=compute, heal="distill"))
        assert [memory.compute for memory in plan.memory] == expected
        for memory in plan.memory:
            held, masters = by_name(memory.amounts), {"bf16": 16, "fp32": 12}[memory.compute]
            assert held["emulator that trains"] == {"bf16": 2, "fp32": 4}[memory.compute] * 2 * BLOCK
            assert held["its master weights, gradients and optimiser moments in fp32"] == masters * 2 * BLOCK
            assert held["one block in fp32"] == 4 * BLOCK


def taken(out: Path) -> None:
    out.mkdir()
    (out / "file").write_text("")


def interrupted(out: Path) -> None:
    run_folder(out).mkdir()
    (run_folder(out) / "run.json").write_text("{}")


REFUSED: dict[str, tuple[dict[str, Any], str, Callable[[Path], None] | None]] = {
    "the folder is taken": ({}, "hospital", taken),
    "an interrupted run is there": ({"heal": "distill"}, "hospital", interrupted),
    "a recipient who is not trusted": ({}, "anybody", None),
    "more blocks than there are": ({"keep": 4}, "hospital", None),
    "no method that trains": ({"methods": ["bitfit"]}, "hospital", None),
    "a head that is the embedding": ({"permit_head": True}, "hospital", None),
    "calibration text that is not there": ({"calibration": "no.txt"}, "hospital", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_run_refuses_the_plan_refuses(base_of: MakeBase, tmp_path: Path, parties: Parties, case: str) -> None:
    settings, recipient, spoil = REFUSED[case]
    base, out = Base(base_of("llama")), tmp_path / "bundle"
    if spoil:
        spoil(out)
    with pytest.raises(OffsiteError) as by_run:
        pack(base, out, recipient, spec(**settings), parties.owner)
    with pytest.raises(OffsiteError) as by_plan:
        plan_pack(base, out, recipient, spec(**settings), parties.owner)
    assert type(by_plan.value) is type(by_run.value)
    assert str(by_plan.value) == str(by_run.value)


def test_a_home_without_a_key_is_refused(base_of: MakeBase, tmp_path: Path) -> None:
    for stage in (plan_pack, pack):
        with pytest.raises(OffsiteError, match="key"):
            stage(Base(base_of("llama")), tmp_path / "out", "hospital", spec(), Home(tmp_path / "nobody"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "what", "times"),
    [
        ({}, "healing one block", 2),
        ({"keep": None, "prune": 0.5}, "healing one block", 3),
        ({"heal": "none", "select": "influence"}, "running the calibration data through one block", 4),
        ({"heal": "distill"}, "running the calibration data through one block; not measured: heal by distill", 4),
        (
            {"narrow": 0.6, "narrow_widths": "budget"},
            "healing one block; not measured: choose widths by budget",
            2,
        ),
    ],
    ids=["refit", "pruning", "influence", "distill", "budget"],
)
def test_measuring_leaves_nothing(
    base_of: MakeBase, tmp_path: Path, parties: Parties, settings: dict[str, Any], what: str, times: int
) -> None:
    base, asked = Base(base_of("llama")), spec(calibration_tokens=512, **settings)
    before = sorted(tmp_path.rglob("*"))
    plan, checked = plan_pack(base, tmp_path / "bundle", "hospital", asked, parties.owner)
    measured = measure_packing(plan, checked, silent).measured
    assert sorted(tmp_path.rglob("*")) == before
    assert measured is not None
    assert (measured.what, measured.times, measured.compute) == (what, times, "fp32")
    assert measured.peak_bytes > plan.memory[0].bytes
    assert measured.run_seconds == pytest.approx(measured.seconds * times)


def test_where_no_network_runs_nothing_is_measured(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    asked = spec(heal="none")
    plan, checked = plan_pack(Base(base_of("llama")), tmp_path / "bundle", "hospital", asked, parties.owner)
    assert measure_packing(plan, checked, silent).measured is None


@pytest.mark.parametrize("returns", [lora_return, full_return], ids=["lora", "full"])
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_plug_in_has_the_planned_bytes(
    base_of: MakeBase, tmp_path: Path, parties: Parties, form: Any, returns: Callable[..., Any]
) -> None:
    if (returns, form) == (full_return, "adapter"):
        pytest.skip("no adapter folder can carry it")
    base = Base(base_of("llama"))
    returned = returns(packed(base.folder, tmp_path / "bundle", parties), tmp_path / "return", parties.data_owner)
    settings = PlugInSpec.model_validate({"as": form, "strength": 0.7})
    plan = plan_plug_in(base, returned.folder, tmp_path / "plugged", settings, parties.owner)
    assert Ledger(parties.owner.ledger).intakes(returned.digest) == []
    made = plug_in(base, intake(returned.folder, parties.owner), tmp_path / "plugged", settings, parties.owner)
    assert by_name(plan.files) == sizes(made.folder)
    assert (plan.form, plan.strength, plan.disk_bytes) == (form, 0.7, sum(sizes(made.folder).values()))
    assert plan.returned_parameters == sum(math.prod(entry.shape) for entry in returned.manifest.tensors.values())
    assert plan.changed_tensors == {"adapter": 0, "merged": 2 * (7 if returns is lora_return else 9)}[form]


@pytest.mark.parametrize("case", ["taken", "no such checkpoint", "another base", "plugged in before"])
def test_what_plugging_in_refuses_its_plan_refuses(
    base_of: MakeBase, tmp_path: Path, parties: Parties, case: str
) -> None:
    base, out, settings = Base(base_of("llama")), tmp_path / "plugged", PlugInSpec()
    returned = lora_return(packed(base.folder, tmp_path / "bundle", parties), tmp_path / "return", parties.data_owner)
    accepted = intake(returned.folder, parties.owner)
    if case == "taken":
        taken(out)
    elif case == "no such checkpoint":
        settings = PlugInSpec(checkpoint=2)
    elif case == "another base":
        base = Base(tiny_base(tmp_path / "other", "llama", 5, seed=7))
    else:
        plug_in(base, accepted, tmp_path / "first", settings, parties.owner)
    with pytest.raises(OffsiteError) as by_plan:
        plan_plug_in(base, returned.folder, out, settings, parties.owner)
    with pytest.raises(OffsiteError) as by_run:
        plug_in(base, accepted, out, settings, parties.owner)
    assert type(by_plan.value) is type(by_run.value)
    assert str(by_plan.value) == str(by_run.value)


def test_a_plan_compares_an_interrupted_run_as_the_run_does(
    base_of: MakeBase, tmp_path: Path, parties: Parties
) -> None:
    """All but the base, which the run alone reads."""
    run = run_folder(tmp_path / "planned")
    run.mkdir()
    settings = spec(heal="distill")
    (run / "run.json").write_text(json.dumps({**identity_of_packing(settings), "base": "of this home"}))

    def plan(asked: PackSpec) -> PackPlan:
        return plan_pack(Base(base_of()), tmp_path / "planned", "hospital", asked, parties.owner, resume=True)[0]

    assert plan(settings).work == ("heal by distill",)
    with pytest.raises(UsageError, match="cannot be resumed") as caught:
        plan(spec(heal="distill", distill_lr=1e-3))
    assert [reason.partition(":")[0] for reason in caught.value.reasons] == ["distill_lr"]
