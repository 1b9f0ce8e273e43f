"""The training loop, used for tuning, distillation and full fine-tuning.

One step runs its micro-batches forward and backward, adds their gradients in fp32, clips them, and updates the master
weights. A run that is interrupted and resumed produces exactly the same bytes as a run without an interruption.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from offsite.errors import OffsiteError
from offsite.kernels import MicroBatchRunner, micro_batch_runner
from offsite.progress import Event, Progress, silent
from offsite.training.loop_settings import Hooks, LoopSettings
from offsite.training.master_weights import MasterWeights
from offsite.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from offsite.training.resume_points import ResumePoint, RunState
from offsite.training.run_log import Write, stop_requests
from offsite.training.schedule import rows_of_steps
from offsite.training.speed_meter import SpeedMeter
from offsite.training.task import TrainingTask

_WEIGHT, _OPTIMIZER, _RANDOM = "weight.", "optimizer.", "random."  # prefixes of tensor names in a resume point


def train(
    task: TrainingTask,
    weights: MasterWeights,
    settings: LoopSettings,
    state: RunState,
    *,
    modules: Sequence[nn.Module] = (),
    log: Write,
    progress: Progress = silent,
    hooks: Hooks | None = None,
) -> None:
    """Train to the last step, and save resume points on the way; the weights are changed in place.

    Args:
        task: the rows of the data set, and the function that computes their loss.
        weights: the parameters that train.
        settings: the number of steps, learning rates, and when to validate and save.
        state: the resume points of this run; training continues from the last one.
        modules: modules that are in training mode during a step and in eval mode during a validation, and so the only
            ones with dropout.
        log: receives a record for every step, validation and start.
        progress: receives the progress events.
        hooks: functions to call at a start, after a step and after a validation; None: there are none.

    Raises:
        OffsiteError: the loss or its gradient is no longer a finite number.
        StorageError: a resume point or the log cannot be written, or the resume point is damaged.
        KeyboardInterrupt: the user stopped the run; a resume point was saved.
    """
    hooks, names, steps = hooks or Hooks(), settings.names, settings.steps
    optimizer = make_optimizer(weights, settings.weight_decay)
    done = _resume(task, weights, optimizer, state)
    hooks.on_start(done)
    rows_of = rows_of_steps(task.order)
    speed = SpeedMeter()
    between_steps = True  # whether the weights are exactly those after `done` steps, so that they may be saved

    def validate_if_due() -> None:
        if settings.validates_after(done):
            figures = _validate(task, modules, progress, done)
            if figures:
                log({"event": names.validation, "step": done, **figures})
                hooks.on_validation(done, figures)
            speed.restart()

    runner = micro_batch_runner(weights.working.values(), task.device, settings.side_by_side)
    with stop_requests() as stopping, runner as run:
        log({"event": names.resume if done else names.start, "step": done, "steps": steps, **task.first_record()})
        validate_if_due()  # the run may have been interrupted between a step and its validation
        try:
            while done < steps:
                between_steps = False
                for step in range(done, min(done + 2, steps)):
                    epoch, rows = rows_of(step)
                    task.prefetch(rows, epoch)
                for module in modules:
                    module.train()
                rate = settings.learning_rate(done)
                facts = _step(task, weights, optimizer, run, settings, *rows_of(done), rate)
                done += 1
                hooks.on_step(done)
                between_steps = True  # only now, since a resume point of this step means that its hook has run
                speed.add(facts[task.unit])
                log({"event": names.step, "step": done, **facts, f"{task.unit}_per_s": speed.per_second})
                if done % settings.save_every == 0 or done == steps or stopping():
                    _save(task, weights, optimizer, state, done)
                if stopping():
                    raise KeyboardInterrupt
                progress(Event(names.stage, done, steps, _reported(task, facts, speed, steps - done)))
                validate_if_due()
        except KeyboardInterrupt:
            if between_steps and done:
                _save(task, weights, optimizer, state, done)
            raise


def _validate(task: TrainingTask, modules: Sequence[nn.Module], progress: Progress, step: int) -> Mapping[str, float]:
    """Put `modules` into eval mode and validate the task; returns its metrics by name. `step`: number of steps done."""
    for module in modules:
        module.eval()
    return task.validate(progress, f"validating step {step}")


def _step(
    task: TrainingTask,
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    run: MicroBatchRunner,
    settings: LoopSettings,
    epoch: int,
    rows: Sequence[int],
    rate: float,
) -> dict[str, float]:
    """Run one optimiser step on the rows with these indices, at learning rate `rate`; return its record for the log.

    The loss is summed over all rows of the step and divided by `task.weight(rows)`, so it does not depend on how the
    rows are cut into micro-batches.
    """
    weight = task.weight(rows)
    sums = _accumulate(task, weights, run, epoch, rows, weight)
    norm = weights.clip_gradients(settings.max_grad_norm)
    terms = {name: value / weight for name, value in sums.items()}
    if not all(map(math.isfinite, (norm, *terms.values()))):
        found = ", ".join(f"{name} {value}" for name, value in terms.items())
        raise OffsiteError(
            f"{settings.names.noun} diverged: the loss or its gradient is no longer a finite number",
            reasons=[f"{found}, gradient norm {norm}, learning rate {rate:.3g}"],
            next_step=settings.names.advice,
        )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weights.publish()
    return {**terms, "lr": rate, "grad_norm": norm, **task.size(rows)}


def _accumulate(
    task: TrainingTask, weights: MasterWeights, run: MicroBatchRunner, epoch: int, rows: Sequence[int], weight: int
) -> dict[str, float]:
    """Run the micro-batches of a step, and add their gradients to those of the master weights.

    The loss is divided by `weight`, which is `task.weight(rows)`.

    Returns:
        Each term of the loss, by name, summed over the micro-batches.
    """
    terms_of: dict[int, Mapping[str, torch.Tensor]] = {}  # loss terms of the micro-batches that have run, by number

    def loss_of(numbered: tuple[int, Sequence[int]]) -> torch.Tensor:
        number, group = numbered
        terms = task.loss_terms(group, epoch)
        terms_of[number] = {name: term.detach() for name, term in terms.items()}
        return torch.stack([task.term_weights[name] * term for name, term in terms.items()]).sum() / weight

    sums = dict.fromkeys(task.term_weights, 0.0)
    for number, _ in enumerate(run(loss_of, list(enumerate(task.micro_batches(rows))))):
        weights.collect_gradients()
        for name, term in terms_of.pop(number).items():
            sums[name] += float(term)
    return sums


def _save(
    task: TrainingTask, weights: MasterWeights, optimizer: torch.optim.Optimizer, state: RunState, step: int
) -> None:
    """Save a resume point after `step` steps, with master weights, the optimiser's state and the random states."""
    held, groups = optimizer_state(weights, optimizer)
    tensors = {f"{_WEIGHT}{name}": master for name, master in weights.masters.items()}
    tensors |= {f"{_OPTIMIZER}{name}": tensor for name, tensor in held.items()}
    tensors[f"{_RANDOM}cpu"] = torch.get_rng_state()
    if task.device.type == "cuda":
        tensors[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state(task.device)
    state.save(ResumePoint(step, tensors, groups))


def _resume(task: TrainingTask, weights: MasterWeights, optimizer: torch.optim.Optimizer, state: RunState) -> int:
    """Restore the last resume point; returns the number of steps already done, or 0 if there is no resume point."""
    point = state.load()
    if point is None:
        return 0

    def of(kind: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(kind): tensor for name, tensor in point.tensors.items() if name.startswith(kind)}

    weights.load(of(_WEIGHT))
    load_optimizer_state(weights, optimizer, of(_OPTIMIZER), point.groups)
    random = of(_RANDOM)
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], task.device)
    return point.step


def _reported(task: TrainingTask, facts: Mapping[str, float], speed: SpeedMeter, left: int) -> dict[str, float | str]:
    """The figures of a step that a progress event shows: loss terms, learning rate, speed and time left.

    Args:
        task: names the loss terms and the unit of the speed.
        facts: the step's record for the log.
        speed: the speed of the last steps.
        left: the number of steps left.
    """
    seconds = round(speed.seconds_left(left))
    return {
        **{name: facts[name] for name in (*task.term_weights, "lr")},
        f"{task.unit}/s": round(speed.per_second),
        "left": f"{seconds // 60}:{seconds % 60:02}",
    }
