"""The plan of tuning: its figures are the run's, it refuses what the run refuses, and measuring leaves nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import packed
from offsite.config import TuneSpec
from offsite.data_owner.check_permissions import resolve_defaults
from offsite.data_owner.identity_of_tuning import identity_of_tuning
from offsite.data_owner.measure_tuning import measure_tuning
from offsite.data_owner.plan import TunePlan, plan_tune
from offsite.data_owner.tune import tune
from offsite.errors import OffsiteError, UsageError
from offsite.kernels.runtime import resolve_runtime, usual_tokens_at_once
from offsite.progress import silent
from offsite.protocol.artifacts import Bundle
from offsite.protocol.home import Home
from offsite.training.run_log import last_record, log_file, run_folder
from tiny import EVERY_KIND, KINDS, Parties, tiny_base, tiny_parties, tiny_pictures, tiny_vision_base

HIDDEN, INNER = 32, 48
BLOCK = HIDDEN * (32 + 16 + 16 + 32) + 3 * HIDDEN * INNER + 2 * HIDDEN
PAIRS = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)  # inputs and outputs of a block's linear layers


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Parties:
    return tiny_parties(tmp_path_factory.mktemp("parties"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base", blocks=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base: Path, parties: Parties) -> Bundle:
    return packed(base, tmp_path_factory.mktemp("packed") / "bundle", parties)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "add", "completion": f" {i}"}) + "\n" for i in range(20)))
    return file


def spec_of(**settings: Any) -> TuneSpec:
    return TuneSpec(**{"rank": 4, "width": 5, "compute": "fp32", "device": "cpu", "max_steps": 1} | settings)


@pytest.fixture
def plan_of(tmp_path: Path, parties: Parties) -> Callable[..., TunePlan]:
    def plan(bundle: Bundle, data: Path, spec: TuneSpec, **others: Any) -> TunePlan:
        return plan_tune(bundle, data, tmp_path / "planned", spec, parties.data_owner, **others)[0]

    return plan


Plan = Callable[..., TunePlan]


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def amounts(plan: TunePlan) -> dict[str, int]:
    (memory,) = plan.memory
    return {amount.name: amount.bytes for amount in memory.amounts}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "full"},
        {"method": "bottleneck"},
        {"lora_alpha": 3.5, "checkpoints": 2, "max_steps": 2},
    ],
    ids=["lora", "full", "bottleneck", "checkpoints"],
)
def test_the_return_has_the_planned_bytes(
    bundle: Bundle, tmp_path: Path, parties: Parties, rows: Path, plan_of: Plan, settings: dict[str, Any]
) -> None:
    spec = spec_of(**settings)
    plan = plan_of(bundle, rows, spec)
    returned = tune(bundle, rows, tmp_path / "return", spec, parties.data_owner)
    assert {amount.name: amount.bytes for amount in plan.files} == sizes(returned.folder)
    shapes = [entry.shape for entry in returned.manifest.tensors.values()]
    by_hand = {"lora": 2 * 4 * PAIRS, "full": 2 * BLOCK, "bottleneck": 2 * 2 * (2 * 5 * HIDDEN + 5 + HIDDEN)}
    assert plan.trained_parameters == sum(map(math.prod, shapes)) == by_hand[spec.adapter.method]
    assert plan.returned_tensors == len(shapes)


def test_with_scores_the_return_differs_by_digits(
    bundle: Bundle, tmp_path: Path, parties: Parties, rows: Path, plan_of: Plan
) -> None:
    spec = spec_of(report_scores=True, checkpoints=2, max_steps=2)
    plan = plan_of(bundle, rows, spec, eval_data=rows)
    returned = tune(bundle, rows, tmp_path / "return", spec, parties.data_owner, eval_data=rows)
    assert plan.held_out_rows == 20
    assert abs(sum(amount.bytes for amount in plan.files) - sum(sizes(returned.folder).values())) < 2 * 20


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_model_can_be_planned(
    tmp_path: Path, parties: Parties, rows: Path, plan_of: Plan, kind: str
) -> None:
    bundle = packed(tiny_base(tmp_path / "base", **{"blocks": 5, **KINDS[kind]}), tmp_path / "bundle", parties)
    plan = plan_of(bundle, rows, spec_of(method="full"))
    trained = sum(math.prod(entry.shape) for entry in bundle.manifest.tensors.values())
    assert plan.trained_parameters == trained
    assert sum(part.parameters for part in plan.bundle if part.name in ("bottom", "top")) == trained
    assert amounts(plan)["weights of the bundle in fp32"] == 4 * sum(part.parameters for part in plan.bundle)


@pytest.mark.parametrize("compute", ["auto", "bf16", "fp32"])
def test_weights_by_hand(bundle: Bundle, rows: Path, plan_of: Plan, compute: Any) -> None:
    plan = plan_of(bundle, rows, TuneSpec(method="full", compute=compute, device="cpu"))
    item = resolve_runtime("cpu", compute, 1).dtype.itemsize
    assert plan.compute == {2: "bf16", 4: "fp32"}[item]
    assert plan.device == "cpu"
    whole, trained = sum(part.parameters for part in plan.bundle), 2 * BLOCK
    expected = {
        f"weights of the bundle in {plan.compute}": item * whole,
        "gradients in fp32": 4 * trained,
        "optimiser moments in fp32": 8 * trained,
    }
    if item == 2:  # else the weights are the masters
        expected |= {"master weights in fp32": 4 * trained, "gradients of a micro-batch in bf16": 2 * trained}
    assert amounts(plan) == expected
    assert plan.memory[0].bytes == sum(expected.values())


def test_earlier_checkpoints_take_room_in_the_run_too(bundle: Bundle, rows: Path, plan_of: Plan) -> None:
    plan = plan_of(bundle, rows, spec_of(max_steps=3, checkpoints=3))
    disk = {amount.name: amount.bytes for amount in plan.disk}
    assert disk["return"] == sum(amount.bytes for amount in plan.files)
    assert disk["earlier checkpoints, in the run's folder"] == 2 * 4 * plan.trained_parameters
    assert plan.disk_bytes == sum(disk.values())


def test_states_before_the_first_trained_block_take_room(
    base: Path, tmp_path: Path, parties: Parties, rows: Path, plan_of: Plan
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties, bottom=0, top=1, keep=5)
    name = "states before the first trained block, at most"
    for settings, cached in (({"epochs": 2.0}, True), ({}, False), ({"epochs": 2.0, "cache_features": "off"}, False)):
        plan = plan_of(bundle, rows, TuneSpec(compute="fp32", device="cpu", **settings))
        assert (name in {amount.name for amount in plan.disk}) is cached


def told(out: Path) -> tuple[int, int]:
    start = last_record(log_file(out), "start")
    assert start is not None
    return start["rows"], start["steps"]


def test_rows_are_counted_as_the_run_counts_them(
    bundle: Bundle, tmp_path: Path, parties: Parties, plan_of: Plan
) -> None:
    long = tmp_path / "long.jsonl"
    texts = ["short", "a row that is longer than the others, and so is left out of what trains " * 3, "two words"]
    long.write_text("".join(json.dumps({"prompt": "say", "completion": f" {text}"}) + "\n" for text in texts))
    spec = TuneSpec(batch_size=1, max_length=32, long_rows="skip", compute="fp32", device="cpu")
    plan = plan_of(bundle, long, spec)
    tune(bundle, long, tmp_path / "return", spec, parties.data_owner)
    assert (plan.rows, plan.rows_left_out, plan.steps) == (2, 1, 2)
    assert told(tmp_path / "return") == (plan.rows, plan.steps)
    assert 2 < plan.longest_row <= 32


def test_a_text_is_counted_in_its_blocks(bundle: Bundle, tmp_path: Path, parties: Parties, plan_of: Plan) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    spec = TuneSpec(batch_size=2, checkpoints=2, max_length=32, rank=4, compute="fp32", device="cpu")
    plan = plan_of(bundle, text, spec)
    tune(bundle, text, tmp_path / "return", spec, parties.data_owner)
    assert told(tmp_path / "return") == (plan.rows, plan.steps)
    assert plan.rows > 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pictures_are_counted_as_the_run_counts_them(
    tmp_path: Path, parties: Parties, plan_of: Plan, method: Any
) -> None:
    bundle = packed(tiny_vision_base(tmp_path / "base", "dinov2", 4), tmp_path / "bundle", parties, keep=1)
    pictures = tiny_pictures(tmp_path / "set", 4)
    (pictures / "red" / "bad.png").write_text("none")
    spec = spec_of(method=method, batch_size=4, eval_share=0.25, skip_bad=True, head_start="random")
    plan = plan_of(bundle, pictures, spec)
    returned = tune(bundle, pictures, tmp_path / "return", spec, parties.data_owner)
    assert {amount.name: amount.bytes for amount in plan.files} == sizes(returned.folder)
    assert plan.rows == told(tmp_path / "return")[0]
    assert plan.rows + plan.rows_left_out + plan.held_out_rows in (12, 13)  # a bad one may be held out
    config = json.loads((bundle.folder / "config.json").read_text())
    assert plan.longest_row == (16 // config["patch_size"]) ** 2 + 1
    classifier = 3 * (2 * config["hidden_size"] + 1)
    assert amounts(plan)["classifier in fp32"] == 4 * classifier


def taken(out: Path) -> None:
    out.mkdir()
    (out / "file").write_text("")


def interrupted(out: Path) -> None:
    run_folder(out).mkdir()
    for name in (".lock", "run.json", "state.json"):
        (run_folder(out) / name).write_text("{}")


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None]] = {
    "the folder is taken": ({}, taken),
    "an interrupted run is there": ({}, interrupted),
    "the rank is not permitted": ({"rank": 65}, None),
    "no rows to report on": ({"report_scores": True}, None),
    "a head that is not permitted": ({"tune_head": True}, None),
    "more checkpoints than steps": ({"checkpoints": 2}, None),
    "a device that is not there": ({"device": "xpu:7"}, None),
    "rows that are too long": ({"max_length": 8}, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_run_refuses_the_plan_refuses(bundle: Bundle, tmp_path: Path, parties: Parties, case: str) -> None:
    settings, spoil = REFUSED[case]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "return"
    rows.write_text(
        json.dumps({"prompt": "a question of several words", "completion": " and an answer of more"}) + "\n"
    )
    if spoil:
        spoil(out)
    spec = spec_of(**settings)
    with pytest.raises(OffsiteError) as by_run:
        tune(bundle, rows, out, spec, parties.data_owner)
    with pytest.raises(OffsiteError) as by_plan:
        plan_tune(bundle, rows, out, spec, parties.data_owner)
    assert type(by_plan.value) is type(by_run.value)
    assert str(by_plan.value) == str(by_run.value)


def test_a_home_without_a_key_is_refused(bundle: Bundle, tmp_path: Path, rows: Path) -> None:
    nobody = Home(tmp_path / "nobody")
    for stage in (plan_tune, tune):
        with pytest.raises(OffsiteError, match=r"identity|key"):
            stage(bundle, rows, tmp_path / "return", spec_of(), nobody)  # type: ignore[operator]


@pytest.mark.parametrize("settings", [{}, {"method": "full", "epochs": 2.0, "max_steps": None}], ids=["lora", "full"])
def test_measuring_leaves_nothing(
    base: Path, tmp_path: Path, parties: Parties, rows: Path, settings: dict[str, Any]
) -> None:
    bundle = packed(base, tmp_path / "bundle", parties, bottom=0, top=1, keep=5)
    spec = spec_of(**{"max_steps": 40, "batch_size": 4} | settings)
    before = sorted(tmp_path.rglob("*"))
    plan, prepared = plan_tune(bundle, rows, tmp_path / "return", spec, parties.data_owner)
    measured = measure_tuning(bundle, plan, prepared, silent).measured
    assert sorted(tmp_path.rglob("*")) == before
    assert measured is not None
    assert measured.peak_bytes > plan.memory[0].bytes
    assert measured.seconds > 0
    steps = 10 if "epochs" in settings else 40
    assert plan.steps == steps
    assert measured.run_seconds == pytest.approx(measured.seconds * measured.times)
    assert 0.5 * steps < measured.times <= steps  # the measured step is of the longest rows
    assert (measured.device, measured.compute) == ("cpu", "fp32")


def test_pictures_can_be_measured(tmp_path: Path, parties: Parties) -> None:
    bundle = packed(tiny_vision_base(tmp_path / "base", blocks=4), tmp_path / "bundle", parties, keep=1)
    spec = spec_of(max_steps=9, batch_size=4)
    home, pictures = parties.data_owner, tiny_pictures(tmp_path / "set", 4)
    plan, prepared = plan_tune(bundle, pictures, tmp_path / "return", spec, home)
    measured = measure_tuning(bundle, plan, prepared, silent).measured
    assert measured is not None
    assert measured.times == plan.steps == 9
    assert not (tmp_path / "return").exists()


def test_a_plan_compares_an_interrupted_run_as_the_run_does(
    bundle: Bundle, rows: Path, plan_of: Plan, tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "planned")
    run.mkdir()
    runtime = resolve_runtime("cpu", "fp32", None)
    spec = resolve_defaults(spec_of(), usual_tokens_at_once(runtime, text=True))
    identity = identity_of_tuning(bundle, rows, None, spec, runtime, several=False)
    (run / "run.json").write_text(json.dumps(identity))
    (run / "state.json").write_text("{}")
    assert plan_of(bundle, rows, spec_of(), resume=True).steps == 1
    with pytest.raises(UsageError, match="cannot be resumed") as caught:
        plan_of(bundle, rows, spec_of(rank=2, max_steps=3), resume=True)
    assert [reason.partition(":")[0] for reason in caught.value.reasons] == ["max_steps", "rank"]
