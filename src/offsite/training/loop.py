"""The training loop, used for tuning, distillation and full fine-tuning.

One step runs its micro-batches forward and backward, adds their gradients in fp32, clips them, and updates the master
weights. A run that is interrupted and resumed produces exactly the same bytes as a run without an interruption.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from offsite.errors import OffsiteError
from offsite.kernels import MicroBatchRunner, micro_batch_runner
from offsite.progress import Event, Progress, silent
from offsite.training.loop_settings import Hooks, LoopSettings
from offsite.training.master_weights import MasterWeights
from offsite.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from offsite.training.processes import ONE, Processes, random_seed
from offsite.training.resume_points import ResumePoint, RunState
from offsite.training.run_log import Write, stop_requests
from offsite.training.schedule import rows_of_steps
from offsite.training.speed_meter import SpeedMeter
from offsite.training.task import TrainingTask

_OTHERS = (
    "the run had {} processes and goes on with {}: sums are rounded in another order, and dropout draws other numbers"
)
_WEIGHT, _OPTIMIZER, _RANDOM = "weight.", "optimizer.", "random."  # prefixes of tensor names in a resume point


def train(
    task: TrainingTask,
    weights: MasterWeights,
    settings: LoopSettings,
    state: RunState | None,
    *,
    modules: Sequence[nn.Module] = (),
    log: Write,
    progress: Progress = silent,
    hooks: Hooks | None = None,
    processes: Processes = ONE,
) -> None:
    """Train to the last step, and save resume points on the way; the weights are changed in place.

    Args:
        task: the rows of the data set, and the function that computes their loss.
        weights: the parameters that train.
        settings: the number of steps, learning rates, and when to validate and save.
        state: the resume points of this run; training continues from the last one. None in every process but the first.
        modules: modules that are in training mode during a step and in eval mode during a validation, and so the only
            ones with dropout.
        log: receives a record for every step, validation and start.
        progress: receives the progress events.
        hooks: functions to call at a start, after a step and after a validation; None: there are none.
        processes: the processes of this run; each runs its share of the rows of every step.

    Raises:
        OffsiteError: the loss or its gradient is no longer a finite number, or another process has ended.
        StorageError: a resume point or the log cannot be written, or the resume point is damaged.
        KeyboardInterrupt: the user stopped the run; a resume point was saved.
    """
    hooks, names, steps = hooks or Hooks(), settings.names, settings.steps
    optimizer = make_optimizer(weights, settings.weight_decay)
    done, before = _resume(task, weights, optimizer, state, processes)
    with processes.together():
        hooks.on_start(done)
    facts_of_start: dict[str, float] = {"processes": processes.count} if processes.count > 1 else {}
    if before not in (0, processes.count):
        progress(Event(_OTHERS.format(before, processes.count), 0))
        facts_of_start |= {"processes": processes.count, "processes_before": before}
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
        start = {"event": names.resume if done else names.start, "step": done, "steps": steps}
        log({**start, **task.first_record(), **facts_of_start})
        validate_if_due()  # the run may have been interrupted between a step and its validation
        try:
            while done < steps:
                between_steps = False
                for step in range(done, min(done + 2, steps)):
                    epoch, rows = rows_of(step)
                    task.prefetch(processes.share(rows), epoch)
                for module in modules:
                    module.train()
                rate = settings.learning_rate(done)
                facts = _step(task, weights, optimizer, run, settings, state, *rows_of(done), rate, processes)
                done += 1
                hooks.on_step(done)
                between_steps = True  # only now, since a resume point of this step means that its hook has run
                speed.add(facts[task.unit])
                log({"event": names.step, "step": done, **facts, f"{task.unit}_per_s": speed.per_second})
                stop = processes.any(stopping())  # a signal to one process stops all after the same step
                if done % settings.save_every == 0 or done == steps or stop:
                    _save(task, weights, optimizer, state, done, processes)
                if stop:
                    processes.agree_to_end()
                    raise KeyboardInterrupt
                progress(Event(names.stage, done, steps, _reported(task, facts, speed, steps - done)))
                validate_if_due()
        except KeyboardInterrupt:
            if between_steps and done and processes.count == 1:  # others may be in the middle of a step
                _save(task, weights, optimizer, state, done, processes)
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
    state: RunState | None,
    epoch: int,
    rows: Sequence[int],
    rate: float,
    processes: Processes,
) -> dict[str, float]:
    """Run one optimiser step on the rows with these indices, at learning rate `rate`; return its record for the log.

    The loss is summed over all rows of the step and divided by `task.weight(rows)`, so it does not depend on how the
    rows are cut into micro-batches and shared by the processes.
    """
    weight = task.weight(rows)
    fillers = _fillers(task, rows, processes) if settings.lockstep else 0
    sums = _accumulate(task, weights, run, epoch, processes.share(rows), weight, [rows[:1]] * fillers)
    if processes.count > 1:
        sums = _sum_over_processes(weights, sums, processes)
    norm = weights.clip_gradients(settings.max_grad_norm)
    terms = {name: value / weight for name, value in sums.items()}
    if not all(map(math.isfinite, (norm, *terms.values()))):
        found = ", ".join(f"{name} {value}" for name, value in terms.items())
        processes.agree_to_end()
        raise OffsiteError(
            f"{settings.names.noun} diverged: the loss or its gradient is no longer a finite number",
            reasons=[f"{found}, gradient norm {norm}, learning rate {rate:.3g}"],
            next_step=settings.names.advice + (state.removal() if state is not None else ""),
        )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weights.publish()
    return {**terms, "lr": rate, "grad_norm": norm, **task.size(rows)}


def _accumulate(
    task: TrainingTask,
    weights: MasterWeights,
    run: MicroBatchRunner,
    epoch: int,
    rows: Sequence[int],
    weight: int,
    fillers: Sequence[Sequence[int]] = (),
) -> dict[str, float]:
    """Run the micro-batches of a step, and add their gradients to those of the master weights.

    Args:
        task: the task.
        weights: the weights that train.
        run: runs the micro-batches.
        epoch: the number of the epoch.
        rows: the rows of the step, in this process.
        weight: the divisor of the loss.
        fillers: further micro-batches that run and count nothing, since other processes run as many.

    Returns:
        Each term of the loss, by name, summed over the micro-batches.
    """
    groups = list(enumerate(task.micro_batches(rows)))
    filling = [(len(groups) + number, filler) for number, filler in enumerate(fillers)]
    terms_of: dict[int, Mapping[str, torch.Tensor]] = {}  # loss terms of the micro-batches that have run, by number

    def loss_of(numbered: tuple[int, Sequence[int]]) -> torch.Tensor:
        number, group = numbered
        terms = task.loss_terms(group, epoch)
        terms_of[number] = {name: term.detach() for name, term in terms.items()}
        loss = torch.stack([task.term_weights[name] * term for name, term in terms.items()]).sum() / weight
        return loss if number < len(groups) else 0 * loss

    for _ in run(loss_of, [*groups, *filling]):
        weights.collect_gradients()
    sums = dict.fromkeys(task.term_weights, 0.0)
    if groups:  # one look for all: for each, the CPU waits until an accelerator has done all that is queued
        found = torch.stack([torch.stack([terms_of[number][name] for name in sums]) for number, _ in groups])
        for terms in found.tolist():
            sums = {name: sums[name] + term for name, term in zip(sums, terms, strict=True)}
    return sums


def _fillers(task: TrainingTask, rows: Sequence[int], processes: Processes) -> int:
    """The number of micro-batches by which this process has fewer in a step than the one with the most."""
    counts = [len(list(task.micro_batches(share))) for share in processes.shares(rows)]
    return max(counts) - counts[processes.place.rank]


def _sum_over_processes(weights: MasterWeights, sums: Mapping[str, float], processes: Processes) -> dict[str, float]:
    """Replace the gradients of the master weights by their sums over all processes.

    A weight without a gradient in all processes (such as of an expert that no token chose) stays without one.

    Args:
        weights: the weights with this process's gradients.
        sums: this process's terms of the loss.
        processes: the processes of this run.

    Returns:
        The terms of the loss, summed over all processes.
    """
    names = list(weights.masters)
    found = processes.sum([*sums.values(), *(weights.masters[name].grad is not None for name in names)])
    present = [name for name, count in zip(names, found[len(sums) :], strict=True) if count]
    for name in present:
        master = weights.masters[name]
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    processes.sum_tensors([gradient for name in present if (gradient := weights.masters[name].grad) is not None])
    return dict(zip(sums, found, strict=False))


def _save(
    task: TrainingTask,
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: RunState | None,
    step: int,
    processes: Processes,
) -> None:
    """Save a resume point after `step` steps, with master weights, the optimiser's state and the random states.

    The first process writes it; all wait until it is written.
    """
    random = {f"{_RANDOM}cpu": processes.gather_tensor(torch.get_rng_state())}
    if task.device.type == "cuda":
        random[f"{_RANDOM}cuda"] = processes.gather_tensor(torch.cuda.get_rng_state(task.device))
    with processes.together():
        if state is not None:
            state.save(_resume_point(weights, optimizer, random, step))


def _resume_point(
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    random: Mapping[str, Sequence[torch.Tensor]],
    step: int,
) -> ResumePoint:
    """The state of a run after `step` steps; `random` holds for each random generator its state in every process."""
    held, groups = optimizer_state(weights, optimizer)
    tensors = {f"{_WEIGHT}{name}": master for name, master in weights.masters.items()}
    tensors |= {f"{_OPTIMIZER}{name}": tensor for name, tensor in held.items()}
    for generator, states in random.items():
        tensors |= {f"{generator}{f'.{rank}' if rank else ''}": own for rank, own in enumerate(states)}
    return ResumePoint(step, tensors, groups)


def _resume(
    task: TrainingTask,
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: RunState | None,
    processes: Processes,
) -> tuple[int, int]:
    """Restore the last resume point, which the first process reads; without one, all get the first one's weights.

    Returns:
        The number of steps already done, and of the processes that the run had; 0 and 0 if there is no resume point.
    """
    point = None
    with processes.together():
        if state is not None:
            point = state.load()
    described: dict[str, Any] | None = None if point is None else {"step": point.step, "groups": list(point.groups)}
    found = processes.from_first(described)
    if found is None:
        if processes.count > 1:
            weights.load(processes.tensors_from_first(weights.masters))
            _draw_differently(task, processes, 0)
        return 0, 0
    tensors = processes.tensors_from_first({} if point is None else point.tensors)

    def of(kind: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}

    weights.load(of(_WEIGHT))
    load_optimizer_state(weights, optimizer, of(_OPTIMIZER), found["groups"])
    random, step = of(_RANDOM), found["step"]
    before = sum(name.partition(".")[0] == "cpu" for name in random)
    own = f".{processes.place.rank}" if before == processes.count and not processes.first else ""
    torch.set_rng_state(random[f"cpu{own}"])
    if f"cuda{own}" in random:
        torch.cuda.set_rng_state(random[f"cuda{own}"], task.device)
    if before != processes.count:
        _draw_differently(task, processes, step)
    return step, before


def _draw_differently(task: TrainingTask, processes: Processes, step: int) -> None:
    """Seed the random generators of every process but the first, so that they draw other numbers for dropout."""
    if not processes.first:
        seed = random_seed(torch.initial_seed(), step, processes.place.rank)
        torch.manual_seed(seed)  # of the CPU and of every CUDA device


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
