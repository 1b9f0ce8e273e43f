"""Trains an adapter: passes a tuning's task, weights and settings to the training loop."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offsite.config import TuneSpec
from offsite.data_owner.image_task import ImageTask
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.data_owner.text_task import TextTask
from offsite.kernels import Report
from offsite.progress import Progress
from offsite.training import loop
from offsite.training.loop_settings import Hooks, LoopSettings
from offsite.training.master_weights import MasterWeights
from offsite.training.processes import ONE, Processes
from offsite.training.resume_points import RunState
from offsite.training.run_log import Write, run_log
from offsite.training.schedule import learning_rate, step_count
from offsite.training.task import Batching
from offsite.training.tensorboard import tensorboard_log

SAME_ROWS = "same rows"  # the event of the log with the loss on the rows of the first step


@dataclass(frozen=True)
class Tuning:
    """A prepared tuning: the task, the blocks, the trained weights, and the report of the kernels."""

    task: TextTask | ImageTask
    blocks: nn.Module  # the list of all blocks of the model
    trained: Sequence[nn.Module]  # the trained blocks, the only ones with dropout
    weights: MasterWeights
    returned: Mapping[str, torch.Tensor]  # the trained weights, by their names in the return
    processes: Processes = ONE  # which tune together
    sharded: bool = False  # whether the processes share the frozen weights of the blocks, and so run in lockstep
    kernels: Report = field(default_factory=lambda: Report("reference"))  # which modules were replaced, and why or not


def train(
    tuning: Tuning,
    spec: TuneSpec,
    state: RunState | None,
    log: Path,
    progress: Progress,
    *,
    checkpoints: Checkpoints | None = None,
    tensorboard: Path | None = None,
) -> None:
    """Train to the last step, saving resume points and checkpoints; the weights are changed in place.

    The log has the held-out loss before and after. Without held-out rows, it has the loss before and after on the rows
    of the first step, since two steps on different rows would not show what training changed; but not if processes
    share the weights of the blocks.

    Args:
        tuning: the prepared tuning.
        spec: the settings, already fitted into memory.
        state: the resume points of this run; training continues from the last one. None in every process but the first.
        log: the file that receives a JSON line for every step and validation, from the first process.
        progress: receives the progress events.
        checkpoints: the checkpoints of the return; None if no return is written.
        tensorboard: a folder for an additional TensorBoard log; None for no such log.

    Raises:
        OffsiteError: the loss or its gradient is no longer a finite number, or another process has ended.
        StorageError: a resume point, a checkpoint or the log cannot be written, or a checkpoint is missing.
        KeyboardInterrupt: the user stopped the run; a resume point was saved.
    """
    processes = tuning.processes
    settings = replace(_loop_settings(spec, tuning.task.rows, checkpoints), lockstep=tuning.sharded)
    hooks = Hooks()
    if checkpoints is not None and processes.first:
        hooks = Hooks(
            on_step=lambda step: checkpoints.save(step, tuning.returned),
            on_validation=lambda step, figures: checkpoints.score(step, figures["loss"]),
        )
    validating = ONE if tuning.sharded else processes  # in lockstep every process validates on all rows
    task = replace(tuning.task, batching=Batching.of(spec), processes=validating)
    with contextlib.ExitStack() as opened:
        logs: list[Write] = []
        with processes.together():
            if processes.first:
                logs.append(opened.enter_context(run_log(log)))
                logs[0]({"event": "kernels", **tuning.kernels.as_dict()})
                logs.append(opened.enter_context(tensorboard_log(tensorboard)))

        def write(record: Mapping[str, Any]) -> None:
            for to_log in logs:
                to_log(record)

        def on_start(done: int) -> None:
            if checkpoints is not None:
                checkpoints.require_saved(done)
            if done == 0:
                log_same_rows(0)

        def log_same_rows(step: int) -> None:
            if processes.first and not (task.validates or tuning.sharded):
                logs[0]({"event": SAME_ROWS, "step": step, "loss": _first_rows_loss(task, tuning.trained)})

        if processes.first:
            hooks = replace(hooks, on_start=on_start)
        loop.train(
            task,
            tuning.weights,
            settings,
            state,
            modules=tuning.trained,
            log=write,
            progress=progress,
            hooks=hooks,
            processes=processes,
        )
        log_same_rows(settings.steps)


@torch.no_grad()
def _first_rows_loss(task: TextTask | ImageTask, trained: Sequence[nn.Module]) -> float:
    """The loss on the rows of the first step, in nats per labelled token or picture; modules end in eval mode.

    Args:
        task: the task.
        trained: the trained blocks, which may have dropout.
    """
    for module in trained:
        module.eval()
    rows = task.order(0)[0]
    return sum(float(task.loss(group, 0)) for group in task.micro_batches(rows)) / task.weight(rows)


def _loop_settings(spec: TuneSpec, rows: int, checkpoints: Checkpoints | None) -> LoopSettings:
    """The settings of the training loop.

    Validation runs before the first step, at the end, at every checkpoint, and every `eval_every` steps.

    Args:
        spec: the settings of the tuning.
        rows: the number of training rows.
        checkpoints: the checkpoints of the return; None if no return is written.
    """
    steps, every, optimizer = step_count(spec, rows), spec.points.eval_every, spec.optimizer

    def rate(step: int) -> float:
        return learning_rate(step, steps, peak=spec.peak_lr, warmup=optimizer.warmup, schedule=optimizer.schedule)

    def validates_after(step: int) -> bool:
        is_checkpoint = checkpoints is not None and checkpoints.is_due(step)
        return is_checkpoint or step in (0, steps) or bool(every and step % every == 0)

    return LoopSettings(
        steps=steps,
        learning_rate=rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        save_every=spec.points.save_every,
        validates_after=validates_after,
        side_by_side=spec.memory.lanes or 1,
    )
