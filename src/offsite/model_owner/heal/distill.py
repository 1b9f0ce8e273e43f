"""Distillation: the emulator's blocks learn to give what the whole middle gave (offsite-tuning, arXiv 2302.04870, 3.3).

The paper's loss is the next token's cross-entropy plus 30 times mean(((H_T - H_S) / rms(H_T))^2) of the hidden states
at the end of the middle. Here the cross-entropy is left out unless asked for: then neither bottom, top, head nor the
teacher runs again, for what enters and leaves the middle lies on the disk. rms is taken per token, and the first token
of a text left out: a few tokens have a thousand times the others' norm. Of an encoder, pictures take the place of text
and every token counts. Bottom and top never train.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from offsite.config import PackSpec
from offsite.errors import OffsiteError
from offsite.kernels.runtime import runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedStack
from offsite.model_owner.calibration import calibration_batches
from offsite.model_owner.heal.middle_states import MiddleStates, middle_states
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.work import work_of
from offsite.models.mixture import in_files
from offsite.progress import Event, Progress
from offsite.storage.safetensors_files import TensorRange, read_header, write_safetensors
from offsite.training.master_weights import TrainedWeights
from offsite.training.resume_points import RunState, to_be_written
from offsite.training.run_log import run_log, stop_requests

HIDDEN_WEIGHT = 30.0  # of the hidden states' term beside the cross-entropy, as in the paper's code
WARMUP = 0.05  # share of the steps
MAX_GRAD_NORM = 1.0
HELD_OUT = 16  # every so many batches one is not trained on
JUDGE_EVERY = 100  # steps between looks at those
SAVE_EVERY = 50  # steps between resume points
_MOMENTS = ("exp_avg", "exp_avg_sq")


def distill(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    healed: Mapping[str, TensorRange],
    spec: PackSpec,
    scratch: Path,
    log: Path,
    progress: Progress,
) -> Mapping[str, TensorRange]:
    """Train the emulator's blocks, from where healing has brought them.

    Args:
        model: the base.
        sandwich: how it is cut.
        emulator: base indices of the emulator's blocks.
        healed: tensors of theirs that were solved before, by base name.
        spec: text, steps and rates.
        scratch: a folder for hidden states and resume points; it outlives an interruption.
        log: the file that gets the healing curve, a JSON line for each step.
        progress: where the events go.

    Returns:
        All tensors of the emulator's blocks by base name, as they lie in a file of `scratch`.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: something cannot be written.
        OffsiteError: the loss is no longer a number.
        KeyboardInterrupt: the user stopped it; a resume point was saved.
    """
    machine = runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    batches = calibration_batches(model, spec.calibration.source, spec.distill.tokens)
    states = middle_states(
        model, sandwich, batches, machine, scratch / "states", progress, "hidden states to distill from"
    )
    after = sandwich.top if spec.distill.ce else ()
    stack = BlockRunner(model, machine).stack(emulator, after, healed, whole=spec.distill.ce > 0)
    starts = tuple(f"{model.row.block_module(index)}." for index in emulator)
    working = {name: parameter for name, parameter in sorted(stack.parameters.items()) if name.startswith(starts)}
    for parameter in working.values():
        parameter.requires_grad = True
    weights = TrainedWeights(working)
    prunes = work_of(sandwich.middle, spec).prunes > 0
    gone = {name: master == 0 for name, master in weights.masters.items() if prunes and model.row.is_linear(name)}
    run = _Distillation(stack, states, weights, spec, gone, skipped=0 if model.row.vision else 1)
    _train(run, RunState(scratch / "distill", {}, resume=True), log, progress)
    file = scratch / "distilled.safetensors"
    file.unlink(missing_ok=True)
    tensors = in_files(model.row, run.weights.masters)
    write_safetensors(file, [to_be_written(name, tensor) for name, tensor in tensors.items()])
    return read_header(file)


def hidden_error(student: Tensor, teacher: Tensor, skipped: int = 1) -> Tensor:
    """mean(((H_T - H_S) / rms(H_T))^2) over the tokens after the skipped, with each token's own rms; both (B, T, H)."""
    student, teacher = student[:, skipped:].float(), teacher[:, skipped:].float()
    scale = teacher.square().mean(-1, keepdim=True).clamp_min(1e-12)  # (B, T - skipped, 1)
    return ((teacher - student).square() / scale).mean()


@dataclass(frozen=True)
class _Distillation:
    stack: LoadedStack
    states: MiddleStates
    weights: TrainedWeights
    spec: PackSpec
    gone: Mapping[str, Tensor]  # of pruned matrices: which numbers stay zero
    skipped: int  # first tokens of a sample that do not count

    @property
    def held_out(self) -> list[int]:
        """Batches that are looked at and not trained on; none of a few."""
        return list(range(HELD_OUT - 1, len(self.states.batches), HELD_OUT))

    def groups(self) -> list[list[int]]:
        """The batches of each step of a pass, before they are shuffled: how many steps it has."""
        held_out = set(self.held_out)
        trained = [position for position in range(len(self.states.batches)) if position not in held_out]
        width = max(1, self.spec.distill.batch_tokens // self.states.tokens[0])
        return [trained[at : at + width] for at in range(0, len(trained), width)]

    def steps(self) -> int:
        return self.spec.distill.steps or max(1, math.ceil(self.spec.distill.epochs * len(self.groups())))

    def of_step(self, step: int) -> list[int]:
        """The batches of one step (from 0); it depends on nothing that ran before."""
        groups = self.groups()
        flat = [position for group in groups for position in group]
        random.Random(f"{self.spec.seed} {step // len(groups)}").shuffle(flat)  # noqa: S311  no secret
        width = len(groups[0])
        at = step % len(groups) * width
        return flat[at : at + width]

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to 0."""
        steps, warmup = self.steps(), round(WARMUP * self.steps())
        if step < warmup:
            return self.spec.distill.lr * (step + 1) / warmup
        return self.spec.distill.lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    def losses(self, position: int) -> tuple[Tensor, Tensor | None]:
        """Of one batch: the hidden states' term, and the cross-entropy if it counts."""
        ids, enters, leaves = self.states.at(position)
        if not self.spec.distill.ce:
            return hidden_error(self.stack(ids, enters), leaves, self.skipped), None
        student, nats = self.stack.to_the_end(ids, enters)
        return hidden_error(student, leaves), nats


def _train(run: _Distillation, state: RunState, log: Path, progress: Progress) -> None:
    """Train to the last step, saving resume points; the weights are changed in place."""
    masters = run.weights.masters
    fused = next(iter(masters.values())).device.type in ("cpu", "cuda", "mps", "xpu")
    optimizer = torch.optim.AdamW(masters.values(), lr=run.spec.distill.lr, weight_decay=0.0, fused=fused)
    done, steps = _restore(run, optimizer, state), run.steps()
    with run_log(log) as write, stop_requests() as stopping:
        write({"event": "distill resume" if done else "distill", "step": done, "steps": steps, **_judged(run)})
        while done < steps:
            facts = _step(run, optimizer, done)
            done += 1
            write({"event": "distill step", "step": done, **facts})
            if done % SAVE_EVERY == 0 or done == steps or stopping():
                _save(run, optimizer, state, done)
            if stopping():
                raise KeyboardInterrupt
            progress(Event("distilling", done, steps, {"error": facts["error"], "lr": facts["lr"]}))
            if done == steps or done % JUDGE_EVERY == 0:
                write({"event": "distill held out", "step": done, **_judged(run)})


def _step(run: _Distillation, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    group = run.of_step(step)
    errors, nats = [], []
    for position in group:
        error, cross = run.losses(position)
        loss = HIDDEN_WEIGHT * error if cross is None else HIDDEN_WEIGHT * error + run.spec.distill.ce * cross
        torch.autograd.backward(loss / len(group))
        run.weights.collect_gradients()
        errors.append(float(error.detach()))
        nats += [] if cross is None else [float(cross.detach())]
    for name, places in run.gone.items():
        gradient = run.weights.masters[name].grad
        if gradient is not None:
            gradient.masked_fill_(places, 0)
    norm = float(nn.utils.clip_grad_norm_(run.weights.masters.values(), MAX_GRAD_NORM))
    rate = run.rate(step)
    if not math.isfinite(norm) or not all(map(math.isfinite, (*errors, *nats))):
        raise OffsiteError(
            "distillation diverged: the loss or its gradient is no longer a finite number",
            reasons=[f"hidden states' error {fmean(errors)}, gradient norm {norm}, learning rate {rate:.3g}"],
            next_step="lower --distill-lr",
        )
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.weights.publish()
    return {"error": fmean(errors), **({"ce": fmean(nats)} if nats else {}), "lr": rate, "grad_norm": norm}


@torch.no_grad()
def _judged(run: _Distillation) -> dict[str, Any]:
    """The error on the batches that are not trained on; nothing where there are none."""
    found = [run.losses(position) for position in run.held_out]
    crosses = [float(cross) for _, cross in found if cross is not None]
    shown = {"error": fmean(float(error) for error, _ in found)} if found else {}
    return shown | ({"ce": fmean(crosses)} if crosses else {})


def _save(run: _Distillation, optimizer: torch.optim.Optimizer, state: RunState, step: int) -> None:
    tensors = {f"weight.{name}": master for name, master in run.weights.masters.items()}
    for name, master in run.weights.masters.items():
        tensors |= {f"{moment}.{name}": optimizer.state[master][moment] for moment in _MOMENTS}
    state.save(step, tensors)


def _restore(run: _Distillation, optimizer: torch.optim.Optimizer, state: RunState) -> int:
    """Take over the last resume point; the number of steps that were done."""
    point = state.load()
    if point is None:
        return 0
    step, tensors = point
    masters = run.weights.masters
    run.weights.load({name: tensors[f"weight.{name}"] for name in masters})
    for name, master in masters.items():
        optimizer.state[master] = {
            "step": torch.tensor(float(step), device=master.device if master.is_cuda else "cpu"),
            **{moment: tensors[f"{moment}.{name}"].to(master.device) for moment in _MOMENTS},
        }
    return step
