"""The training loop: from any resume point to the last step, the same bytes as without an interruption."""

import collections
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.data_owner.text_task import Task
from offsite.errors import OffsiteError
from offsite.kernels import MicroBatchRunner, micro_batch_runner
from offsite.progress import Event, Progress
from offsite.training.master_weights import TrainedWeights
from offsite.training.resume_points import RunState
from offsite.training.run_log import run_log, stop_requests
from offsite.training.schedule import learning_rate, rows_of_steps, step_count
from offsite.training.tensorboard import board

_SPEED_STEPS = 20  # steps over which speed and time left are averaged
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Tuning:
    """What a training run works on."""

    task: Task
    blocks: nn.Module  # the list of all of them
    trained: Sequence[nn.Module]  # those that train: dropout runs in these and nowhere else
    weights: TrainedWeights
    decayed: frozenset[str]  # trained weights that decay: those of linear maps
    returned: Mapping[str, torch.Tensor]  # the trained weights, by the names under which they are returned
    faster: Mapping[str, float] = field(default_factory=dict)  # weights whose learning rate is multiplied by this


def train(
    tuning: Tuning,
    spec: TuneSpec,
    state: RunState,
    checkpoints: Checkpoints,
    log: Path,
    progress: Progress,
    *,
    tensorboard: Path | None = None,
) -> None:
    """Train to the last step, saving resume points and checkpoints; the weights are changed in place.

    Raises:
        OffsiteError: the loss is no longer a number.
        StorageError: a resume point, a checkpoint or the log cannot be written, or a checkpoint is gone.
        KeyboardInterrupt: the user stopped it; a resume point was saved.
    """
    steps = step_count(spec, tuning.task.rows)
    optimizer = _optimizer(tuning, spec)
    done = _restore(tuning, optimizer, state)
    checkpoints.require_taken(done)
    rows_of = rows_of_steps(spec, tuning.task.rows, tuning.task.order)
    speed, unit = _Speed(), tuning.task.unit
    whole = True  # whether the weights are those after `done` steps, and not between two
    with (
        run_log(log) as to_file,
        board(tensorboard) as to_board,
        stop_requests() as stopping,
        micro_batch_runner(tuning.weights.working.values(), tuning.task.device, spec.memory.lanes or 1) as run,
    ):

        def write(record: Mapping[str, Any]) -> None:
            to_file(record)
            to_board(record)

        def validate() -> None:
            loss = _validate(tuning, spec, done, write, progress)
            if loss is not None:
                checkpoints.score(done, loss)
            speed.rest()

        write({"event": "resume" if done else "start", "step": done, "steps": steps, "rows": tuning.task.rows})
        if _is_validated(spec, checkpoints, done):  # an interruption may have come between the step and its validation
            validate()
        try:
            while done < steps:
                whole = False
                for step in range(done, min(done + 2, steps)):
                    epoch, rows = rows_of(step)
                    tuning.task.foresee(rows, spec.seed, epoch)
                facts = _step(tuning, optimizer, run, spec, *rows_of(done), learning_rate(spec, done, steps))
                done += 1
                checkpoints.take(done, tuning.returned)
                whole = True  # only now: a resume point of this step says that its checkpoint has been taken
                speed.add(facts[unit])
                write({"event": "step", "step": done, **facts, f"{unit}_per_s": speed.per_s})
                if done % spec.points.save_every == 0 or done == steps or stopping():
                    _save(tuning, optimizer, state, done)
                if stopping():
                    raise KeyboardInterrupt
                progress(Event("tuning", done, steps, _shown(facts, unit, speed, steps - done)))
                if _is_validated(spec, checkpoints, done):
                    validate()
        except KeyboardInterrupt:
            if whole and done:
                _save(tuning, optimizer, state, done)
            raise


def _step(
    tuning: Tuning,
    optimizer: torch.optim.Optimizer,
    run: MicroBatchRunner,
    spec: TuneSpec,
    epoch: int,
    rows: Sequence[int],
    rate: float,
) -> dict[str, float]:
    """One optimiser step; the loss is per labelled token of the whole step, however it is cut into micro-batches."""
    task, masters = tuning.task, list(tuning.weights.masters.values())
    size = task.size(rows)
    labels = size["labels"]
    loss = 0.0
    for block in tuning.trained:
        block.train()

    for part in run(lambda group: task.loss(group, spec.seed, epoch) / labels, list(task.groups(rows, spec))):
        tuning.weights.collect_gradients()
        loss += part
    norm = float(nn.utils.clip_grad_norm_(masters, spec.optimizer.max_grad_norm))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise OffsiteError(
            "tuning diverged: the loss or its gradient is no longer a finite number",
            reasons=[f"loss {loss}, gradient norm {norm}, learning rate {rate:.3g}"],
            next_step="lower --lr; if it happens at the first step, the bundle's weights or the rows are odd",
        )
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate * parameters["faster"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tuning.weights.publish()
    return {"loss": loss, "lr": rate, "grad_norm": norm, **size}


def _optimizer(tuning: Tuning, spec: TuneSpec) -> torch.optim.AdamW:
    masters = tuning.weights.masters
    groups: list[dict[str, Any]] = [
        {
            "params": [
                master
                for name, master in masters.items()
                if (name in tuning.decayed) is decays and tuning.faster.get(name, 1.0) == faster
            ],
            "weight_decay": spec.optimizer.weight_decay if decays else 0.0,
            "faster": faster,
        }
        for faster in sorted({1.0, *tuning.faster.values()})
        for decays in (True, False)
    ]
    fused = next(iter(masters.values())).device.type in ("cpu", "cuda", "mps", "xpu")
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=spec.peak_lr, fused=fused)


def _is_validated(spec: TuneSpec, checkpoints: Checkpoints, step: int) -> bool:
    """Whether there is a validation after so many steps."""
    return checkpoints.is_due(step) or bool(step and spec.points.eval_every and step % spec.points.eval_every == 0)


def _validate(
    tuning: Tuning, spec: TuneSpec, step: int, write: Callable[[Mapping[str, Any]], None], progress: Progress
) -> float | None:
    """The loss of the held-out rows, also into the log; None where there are none."""
    for block in tuning.trained:
        block.eval()
    figures = tuning.task.validate(spec, progress, f"validating step {step}")
    if not figures:
        return None
    write({"event": "validation", "step": step, **figures})
    return figures["loss"]


def _save(tuning: Tuning, optimizer: torch.optim.Optimizer, state: RunState, step: int) -> None:
    tensors = {f"weight.{name}": master for name, master in tuning.weights.masters.items()}
    for name, master in tuning.weights.masters.items():
        tensors |= {f"{moment}.{name}": optimizer.state[master][moment] for moment in _MOMENTS}
    tensors["random.cpu"] = torch.get_rng_state()
    device = tuning.task.device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    state.save(step, tensors)


def _restore(tuning: Tuning, optimizer: torch.optim.Optimizer, state: RunState) -> int:
    """Take over the last resume point; the number of steps that were done."""
    point = state.load()
    if point is None:
        return 0
    step, tensors = point
    masters = tuning.weights.masters
    tuning.weights.load({name: tensors[f"weight.{name}"] for name in masters})
    for name, master in masters.items():
        optimizer.state[master] = {
            "step": torch.tensor(float(step), device=master.device if master.is_cuda else "cpu"),
            **{moment: tensors[f"{moment}.{name}"].to(master.device) for moment in _MOMENTS},
        }
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], tuning.task.device)
    return step


class _Speed:
    """Tokens or images and seconds of the last steps; time spent on anything else is left out."""

    def __init__(self) -> None:
        self._steps: collections.deque[tuple[float, float]] = collections.deque(maxlen=_SPEED_STEPS)
        self._since = time.perf_counter()

    def add(self, units: float) -> None:
        now = time.perf_counter()
        self._steps.append((units, now - self._since))
        self._since = now

    def rest(self) -> None:
        self._since = time.perf_counter()

    @property
    def per_s(self) -> float:
        return round(sum(units for units, _ in self._steps) / max(self._seconds, 1e-9), 1)

    def left(self, steps: int) -> float:
        return steps * self._seconds / max(1, len(self._steps))

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds in self._steps)


def _shown(facts: Mapping[str, float], unit: str, speed: _Speed, left: int) -> dict[str, float | str]:
    seconds = round(speed.left(left))
    return {
        "loss": facts["loss"],
        "lr": facts["lr"],
        f"{unit}/s": round(speed.per_s),
        "left": f"{seconds // 60}:{seconds % 60:02}",
    }
