"""Distillation: the emulator comes nearer to the middle, nothing else moves, and an interruption changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.config import PackSpec
from offsite.errors import OffsiteError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.heal import distill as distill_module
from offsite.model_owner.heal.distill import hidden_error
from offsite.model_owner.heal.middle_states import MiddleStates
from offsite.model_owner.pack import PACKING, pack
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.progress import Event
from offsite.protocol.artifacts import Base, Bundle
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from offsite.training.run_log import last_record, log_file
from tiny import FAMILIES, KINDS, MakeBase, Parties

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "bottom": 1, "top": 1, "keep": 2, "heal": "refit,distill", "compute": "fp32", "device": "cpu", "threads": 1,
    "dtype": "fp32", "calibration_tokens": 1024, "distill_tokens": 2048, "distill_steps": 12, "distill_lr": 3e-3,
}  # fmt: skip


def spec(**settings: Any) -> PackSpec:
    return PackSpec.model_validate({**SETTINGS, **settings})


def packs(base: Path, out: Path, parties: Parties, resume: bool = False, **settings: Any) -> Bundle:
    return pack(Base(base), out, "hospital", spec(**settings), parties.owner, resume=resume)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.with_name(f"{out.name}.log.jsonl").read_text().splitlines()]


def state_behind(folder: Path, blocks: int, ids: torch.Tensor) -> torch.Tensor:
    """The hidden state behind the first so many blocks."""
    model = load_model(folder, dtype=torch.float32, device=CPU)
    family = ARCHITECTURES[model.config.model_type]
    seen: list[torch.Tensor] = []
    block = model.get_submodule(family.in_block(blocks - 1, "").rstrip("."))
    block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids, use_cache=False)
    return seen[0]


@pytest.mark.parametrize("ce", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_emulator_comes_nearer_and_nothing_else_moves(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, ce: float
) -> None:
    base = base_of(family, 7)
    dropped = packs(base, tmp_path / "dropped", parties, heal="none")
    distilled = packs(base, tmp_path / "distilled", parties, heal="distill", distill_ce=ce)
    ids = calibration_batches(open_base(Base(base)), None, 2048)[0]
    teacher = state_behind(base, 6, ids)
    errors = [float(hidden_error(state_behind(one.folder, 3, ids), teacher)) for one in (dropped, distilled)]
    assert errors[1] < 0.9 * errors[0], errors
    family = ARCHITECTURES[distilled.manifest.architecture]
    before, after = (open_checkpoint(one.folder).tensors for one in (dropped, distilled))
    assert before.keys() == after.keys()
    for name in before:
        place = family.block_of(name)
        same = bool((read_float32(before[name]) == read_float32(after[name])).all())
        assert same == (place is None or place[0] in distilled.manifest.split.trained), name
    steps = [line for line in log_of(tmp_path / "distilled") if line["event"] == "distill step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(("ce" in line) == bool(ce) for line in steps)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith("distilled")} == {
        "distilled",
        "distilled.log.jsonl",
    }


def test_the_error_is_the_papers_with_each_tokens_own_rms() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    teacher[:, 0] *= 1e4  # a massive activation at the first token says nothing
    expected = 0.0
    for b in range(2):
        for t in range(1, 5):
            rms = teacher[b, t].square().mean().sqrt()
            expected += float((((teacher[b, t] - student[b, t]) / rms) ** 2).mean()) / 8
    assert float(hidden_error(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "kind", ["gemma2", "opt, projections, norms behind", "falcon, alibi, sequential", "phi3", "gpt_neox", "mixtral"]
)
def test_families_that_refit_refuses_or_that_differ_can_be_distilled(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    packs(base_of(blocks=5, **KINDS[kind]), tmp_path / "out", parties, keep=1, heal="distill", distill_ce=0.5)
    errors = [line["error"] for line in log_of(tmp_path / "out") if line["event"] == "distill step"]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(("compute", "end", "first"), [("fp32", KeyboardInterrupt, 8), ("bf16", RuntimeError, 5)])
def test_resumed_is_bit_for_bit_the_same(
    base_of: MakeBase,
    tmp_path: Path,
    parties: Parties,
    compute: str,
    end: type[BaseException],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interruption saves the step that it comes after; a crash goes back to the last resume point."""
    monkeypatch.setattr(distill_module, "SAVE_EVERY", 4)
    base = base_of("llama", 6)
    whole = packs(base, tmp_path / "whole", parties, compute=compute)

    def stop(event: Event) -> None:
        if event.stage == "distilling" and event.done == 7:
            raise end

    out = tmp_path / "interrupted"
    with pytest.raises(end):
        pack(Base(base), out, "hospital", spec(compute=compute), parties.owner, stop)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        packs(base, out, parties, compute=compute)
    with pytest.raises(UsageError, match="distill_lr"):
        packs(base, out, parties, resume=True, compute=compute, distill_lr=1e-3)
    events: list[Event] = []
    resumed = pack(Base(base), out, "hospital", spec(compute=compute), parties.owner, events.append, resume=True)
    assert not any(event.stage == "healing by refit" for event in events)  # that was done
    assert [event.done for event in events if event.stage == "distilling"] == list(range(first, 13))
    ours, theirs = (open_checkpoint(one.folder).tensors for one in (resumed, whole))
    assert all(bool((read_float32(ours[name]) == read_float32(theirs[name])).all()) for name in theirs)
    assert not out.with_name("interrupted.run").exists()


def test_a_time_budget_gives_as_many_steps_as_fit_and_a_resumed_run_has_as_many(
    base_of: MakeBase, tmp_path: Path, parties: Parties
) -> None:
    base, out, minutes = base_of("llama", 6), tmp_path / "out", 0.1
    settings = {"heal_minutes": minutes, "distill_steps": None}
    before: list[Event] = []

    def stop(event: Event) -> None:
        before.append(event)
        if event.stage == "distilling" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(Base(base), out, "hospital", spec(**settings), parties.owner, stop)
    measured = json.loads((tmp_path / "out.run" / "distill-steps.json").read_text())
    assert 3 < measured["steps"] <= 60 * minutes / measured["seconds_per_step"]
    after: list[Event] = []
    pack(Base(base), out, "hospital", spec(**settings), parties.owner, after.append, resume=True)
    totals = {event.total for event in (*before, *after) if event.stage == "distilling"}
    assert totals == {measured["steps"]}
    assert max(event.done for event in after if event.stage == "distilling") == before[-1].total


@pytest.mark.parametrize("settings", [{"distill_steps": 5}, {"distill_steps": None, "heal": "refit"}])
def test_a_time_budget_is_a_length_of_the_distillation(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heal_minutes"):
        spec(heal_minutes=1, **settings)


@pytest.mark.parametrize(
    ("family", "healed"), [("llama", "refit of mlp in closed form, distill"), ("gemma2", "distill")]
)
def test_a_time_budget_alone_distils(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, healed: str
) -> None:
    """With what goes before it in this family: refit does harm to pruned blocks that have norms behind."""
    quick = {"threads": 1, "device": "cpu", "calibration_tokens": 1024, "distill_tokens": 2048}
    pack(Base(base_of(family, 6)), tmp_path / "out", "hospital", PackSpec(heal_minutes=0.02, **quick), parties.owner)
    record = last_record(log_file(tmp_path / "out"), PACKING)
    assert record is not None
    assert record["emulator"].endswith(f"zero by sparsegpt, {healed}")


def test_a_time_budget_for_what_cannot_be_distilled(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    settings = PackSpec(heal_minutes=1, bits=4, bottom=1, top=1)
    with pytest.raises(UsageError, match="would do nothing") as caught:
        pack(Base(base_of("llama", 5)), tmp_path / "out", "hospital", settings, parties.owner)
    assert str(caught.value.next_step).endswith("pack with --heal none, without --heal-minutes")


def test_a_rate_that_is_far_too_high_is_told(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    with pytest.raises(OffsiteError, match=r"diverged(.|\n)*--distill-lr"):
        packs(base_of("llama", 5), tmp_path / "out", parties, distill_lr=1e30)
    assert not (tmp_path / "out").exists()


def test_every_batch_is_seen_once_a_pass_and_the_held_out_ones_never(
    base_of: MakeBase, tmp_path: Path, parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill_module, "HELD_OUT", 4)
    seen: list[int] = []
    read = MiddleStates.at

    def watched(states: MiddleStates, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            seen.append(position)
        return read(states, position)

    monkeypatch.setattr(MiddleStates, "at", watched)
    packs(
        base_of("llama", 5), tmp_path / "out", parties,
        keep=1, distill_steps=None, distill_epochs=2, distill_tokens=8 * 64 * 8, distill_batch_tokens=1024,
    )  # fmt: skip
    assert sorted(seen) == sorted(2 * [0, 1, 2, 4, 5, 6])
    assert sorted(seen[:6]) == [0, 1, 2, 4, 5, 6]
    assert seen[:6] != seen[6:]
