"""The training loop on a task of a few numbers: no text, no pictures, no transformers."""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from offsite.errors import OffsiteError
from offsite.progress import Event, Progress, silent
from offsite.training.loop import train
from offsite.training.loop_settings import Hooks, LoopSettings, RunNames
from offsite.training.master_weights import MasterWeights
from offsite.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from offsite.training.resume_points import RunState
from offsite.training.schedule import learning_rate

STEPS = 6


@dataclass(frozen=True)
class ToyTask:
    """Regression on 8 rows of 3 numbers, 4 rows a step, row i counting i + 1 times; with dropout on the inputs."""

    unit: ClassVar[str] = "rows"
    term_weights: ClassVar[Mapping[str, float]] = {"error": 1.0, "size": 0.1}
    network: nn.Module
    at_once: int = 4
    scale: float = 1.0
    prefetched: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def order(self, epoch: int) -> list[list[int]]:
        rows = np.random.default_rng([7, epoch]).permutation(8).tolist()
        return [rows[:4], rows[4:]]

    def micro_batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        return [rows[at : at + self.at_once] for at in range(0, len(rows), self.at_once)]

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        self.prefetched.append((epoch, *rows))

    def loss_terms(self, rows: Sequence[int], epoch: int) -> dict[str, torch.Tensor]:
        weight = next(self.network.parameters())
        inputs = torch.from_numpy(np.random.default_rng(1).normal(size=(8, 3)))[list(rows)].to(weight.dtype)  # (B, 3)
        outputs = self.network(inputs)[:, 0].float()  # (B,)
        counts = torch.tensor([row + 1.0 for row in rows])
        targets = self.scale * torch.tensor([float(row) for row in rows])
        return {"error": (counts * (outputs - targets).square()).sum(), "size": (counts * outputs.square()).sum()}

    def weight(self, rows: Sequence[int]) -> int:
        return sum(row + 1 for row in rows)

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        return {"rows": len(rows)}

    def first_record(self) -> dict[str, float]:
        return {"known": 8}

    @torch.no_grad()
    def validate(self, progress: Progress, stage: str) -> dict[str, float]:
        progress(Event(stage, 8, 8))
        return {"error": float(self.loss_terms(range(8), 0)["error"]), "training": float(self.network.training)}


def network(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    return made.to(dtype).eval()


def settings_of(**settings: Any) -> LoopSettings:
    usual: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": lambda step: learning_rate(step, STEPS, peak=0.05, warmup=0.2),
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "save_every": 2,
        "validates_after": lambda step: step in (2, STEPS),
    }
    return LoopSettings(**usual | settings)


class Run:
    """One training run in a folder; what it leaves is looked at afterwards."""

    def __init__(self, folder: Path, **network_settings: Any) -> None:
        self.network = network(**network_settings)
        self.task = ToyTask(self.network)
        self.weights = MasterWeights(
            dict(self.network.named_parameters()), decayed=["1.weight", "3.weight"], rate_factors={"3.bias": 10.0}
        )
        self.state = RunState(folder, {}, resume=True)
        self.log: list[dict[str, Any]] = []

    def train(self, progress: Progress = silent, hooks: Hooks | None = None, seed: int = 3, **settings: Any) -> None:
        torch.manual_seed(seed)
        train(
            self.task,
            self.weights,
            settings_of(**settings),
            self.state,
            modules=[self.network],
            log=lambda record: self.log.append(dict(record)),
            progress=progress,
            hooks=hooks,
        )

    def masters(self) -> dict[str, torch.Tensor]:
        return {name: master.detach().clone() for name, master in self.weights.masters.items()}

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.log if record["event"] == event]


def interrupt_after(step: int) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if event.stage == "tuning" and event.done == step:
            raise KeyboardInterrupt

    return stop


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("side_by_side", [1, 2])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_micro_batches_give_what_one_big_batch_gives(tmp_path: Path, at_once: int, side_by_side: int) -> None:
    big, small = Run(tmp_path / "big"), Run(tmp_path / "small")
    small.task = replace(small.task, at_once=at_once)
    big.train()
    small.train(side_by_side=side_by_side)
    for name, master in big.masters().items():
        torch.testing.assert_close(small.masters()[name], master, rtol=1e-5, atol=1e-6)
    for one, other in zip(big.of("step"), small.of("step"), strict=True):
        assert other["error"] == pytest.approx(one["error"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_a_step_is_that_of_torch_alone(tmp_path: Path) -> None:
    """Clipping, decay groups, learning rates and the mean over the weight of a step."""
    run, reference = Run(tmp_path / "run"), network()
    run.train()
    named = dict(reference.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named["1.weight"], named["3.weight"]], "weight_decay": 0.1, "factor": 1.0},
            {"params": [named["1.bias"]], "weight_decay": 0.0, "factor": 1.0},
            {"params": [named["3.bias"]], "weight_decay": 0.0, "factor": 10.0},
        ]
    )
    task = ToyTask(reference)
    for step in range(STEPS):
        rows = task.order(step // 2)[step % 2]
        terms = task.loss_terms(rows, 0)
        ((terms["error"] + 0.1 * terms["size"]) / task.weight(rows)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, STEPS, peak=0.05, warmup=0.2)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in named.items():
        torch.testing.assert_close(run.masters()[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_interrupted_at_any_step_goes_on_bit_for_bit(tmp_path: Path, step: int, dtype: torch.dtype) -> None:
    entire = Run(tmp_path / "entire", dropout=0.3, dtype=dtype)
    entire.train()
    parts = Run(tmp_path / "parts", dropout=0.3, dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        parts.train(interrupt_after(step))
    resumed = Run(tmp_path / "parts", dropout=0.3, dtype=dtype)
    resumed.train(seed=99)  # the random state is that of the resume point
    assert_same(resumed.masters(), entire.masters())
    assert_same(resumed.network.state_dict(), entire.network.state_dict())
    ours = [{**record, "rows_per_s": 0} for record in (*parts.of("step"), *resumed.of("step"))]
    assert ours == [{**record, "rows_per_s": 0} for record in entire.of("step")]
    assert resumed.log[0] == {"event": "resume", "step": step, "steps": STEPS, "known": 8}


def test_a_crash_goes_back_to_the_last_resume_point(tmp_path: Path) -> None:
    def crash(event: Event) -> None:
        if event.done == 5:
            raise RuntimeError("power cut")

    entire, parts = Run(tmp_path / "entire", dropout=0.3), Run(tmp_path / "parts", dropout=0.3)
    entire.train()
    with pytest.raises(RuntimeError):
        parts.train(crash)
    resumed = Run(tmp_path / "parts", dropout=0.3)
    resumed.train(seed=99)
    assert [record["step"] for record in resumed.of("step")] == [5, 6]
    assert_same(resumed.masters(), entire.masters())


def test_a_resume_point_is_the_optimisers_state_dict_without_a_pickle(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.train()
    assert {file.name for file in run.state.folder.iterdir()} == {"run.json", "state.json", "state-6.safetensors"}
    point = run.state.load()
    assert point is not None
    names = list(run.weights.masters)
    keys = ("weight", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert point.tensors.keys() == {f"{key}.{name}" for key in keys for name in names} | {"random.cpu"}
    assert float(point.tensors["optimizer.step.1.bias"]) == STEPS
    assert [(group["weight_decay"], group["rate_factor"], group["params"]) for group in point.groups] == [
        (0.1, 1.0, ["1.weight", "3.weight"]),
        (0.0, 1.0, ["1.bias"]),
        (0.0, 10.0, ["3.bias"]),
    ]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_waits_for_the_step_and_saves(tmp_path: Path, sent: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def press(event: Event) -> None:
        if event.stage == "tuning" and event.done == 2:
            os.kill(os.getpid(), sent)

    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.train(press, save_every=100)
    point = run.state.load()
    assert point is not None
    assert point.step == 3
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interruption_inside_a_step_saves_nothing(tmp_path: Path) -> None:
    """The weights are then neither those before nor those after it."""

    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.train(hooks=Hooks(on_step=interrupt), save_every=2)
    point = run.state.load()
    assert point is not None
    assert point.step == 2


def test_a_run_that_diverges_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.task = replace(run.task, scale=1e30)
    names = RunNames(noun="the toy", advice="lower the scale")
    with pytest.raises(OffsiteError, match=r"the toy diverged(.|\n)*error inf, size (.|\n)*lower the scale"):
        run.train(names=names)
    assert run.of("step") == []


def test_hooks_and_validations_come_in_order(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    hooks = Hooks(
        on_start=lambda step: calls.append(("start", step)),
        on_step=lambda step: calls.append(("step", step)),
        on_validation=lambda step, figures: calls.append((f"validation {sorted(figures)}", step)),
    )
    run = Run(tmp_path / "run")
    run.train(hooks=hooks)
    figures = "validation ['error', 'training']"
    assert calls == [
        ("start", 0), ("step", 1), ("step", 2), (figures, 2), *(("step", step) for step in range(3, 7)), (figures, 6),
    ]  # fmt: skip
    assert [record["training"] for record in run.of("validation")] == [0.0, 0.0]
    assert run.network.training is False


def test_a_validation_that_an_interruption_cut_off_is_made_on_resuming(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "validating step 2":
            raise KeyboardInterrupt

    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.train(stop)
    resumed = Run(tmp_path / "run")
    resumed.train()
    assert [record["step"] for record in resumed.of("validation")] == [2, 6]


def test_the_progress_shows_each_term_speed_and_time_left(tmp_path: Path) -> None:
    events: list[Event] = []
    Run(tmp_path / "run").train(events.append, names=RunNames(stage="toying"))
    shown = [event for event in events if event.stage == "toying"]
    assert [(event.done, event.total) for event in shown] == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert set(shown[0].facts or {}) == {"error", "size", "lr", "rows/s", "left"}


def test_rows_are_prefetched_one_step_ahead_also_across_epochs(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.train()
    epochs = [(step // 2, *run.task.order(step // 2)[step % 2]) for step in range(STEPS)]
    assert run.task.prefetched == [one for step in range(STEPS) for one in epochs[step : step + 2]]


def test_fixed_entries_do_not_move_and_do_not_count_in_the_norm(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    mask = torch.zeros(5, 3, dtype=torch.bool)
    mask[1:] = True
    with torch.no_grad():
        run.network.get_parameter("1.weight")[mask] = 0.0
    run.weights = MasterWeights({"1.weight": run.network.get_parameter("1.weight")}, fixed={"1.weight": mask})
    run.train(weight_decay=0.0)
    weight = run.masters()["1.weight"]
    assert bool((weight[mask] == 0).all())
    assert bool((weight[0] != 0).all())


def test_the_log_is_plain_json(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.train()
    assert json.loads(json.dumps(run.log)) == run.log
    assert set(run.of("step")[0]) == {"event", "step", "error", "size", "lr", "grad_norm", "rows", "rows_per_s"}


def test_the_optimisers_state_goes_where_this_device_wants_it() -> None:
    """AdamW is fused on a CPU, but not on every device: then it wants the number of steps on the CPU."""
    weights = MasterWeights(dict(network().named_parameters()))
    optimizer = make_optimizer(weights, 0.1)
    for master in weights.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    tensors, groups = optimizer_state(weights, optimizer)
    for device, fused in (("meta", False), ("cpu", True)):
        others = MasterWeights(dict(network().to(device).named_parameters()))
        restored = make_optimizer(others, 0.1)
        load_optimizer_state(others, restored, tensors, groups)
        assert [bool(group["fused"]) for group in restored.param_groups] == [fused] * len(groups)
        for state in restored.state.values():
            assert float(state["step"]) == 1  # on meta, a number there could not be read
            assert state["exp_avg"].device.type == device
