"""Distillation: the emulator's blocks are trained on the output of the base's middle (arXiv 2302.04870, section 3.3).

The paper's loss is the next token's cross-entropy plus 30 times mean(((H_T - H_S) / rms(H_T))^2) of the hidden states
at the end of the middle, of teacher (T) and student (S). Here the cross-entropy is off by default. Then bottom, top,
head and teacher need not run, because the hidden states before and after the middle are on disk. rms is computed per
token. The first token of a text is left out, because a few tokens have a norm a thousand times larger than the others.
For an image encoder the data are pictures, and all tokens count. Bottom and top never train.
"""

import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from offsite.config import PackSpec
from offsite.kernels.runtime import resolve_runtime, seeded
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedStack
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.heal.healing_protocol import Healing
from offsite.model_owner.heal.middle_states import MiddleStates, middle_states
from offsite.models.mixture import in_files
from offsite.progress import Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import TensorRange, read_header, write_safetensors
from offsite.training.loop import train
from offsite.training.loop_settings import LoopSettings, RunNames
from offsite.training.master_weights import MasterWeights
from offsite.training.resume_points import RunState, to_new_tensor
from offsite.training.run_log import run_log
from offsite.training.schedule import learning_rate

HIDDEN_WEIGHT = 30.0  # weight of the hidden states' term, as in the paper's code
WARMUP = 0.05  # fraction of the steps
MAX_GRAD_NORM = 1.0
HELD_OUT = 16  # one batch in this many is held out for validation
VALIDATE_EVERY = 100  # steps between validations
SAVE_EVERY = 50  # steps between resume points
_NAMES = RunNames(
    noun="distillation",
    stage="distilling",
    start="distill",
    resume="distill resume",
    step="distill step",
    validation="distill held out",
    advice="lower --distill-lr",
)


def heal_emulator(healing: Healing, healed: Mapping[str, TensorRange]) -> Mapping[str, TensorRange]:
    """Train the emulator's blocks to reproduce the output of the base's middle.

    Args:
        healing: the emulator and the settings; the loss of each step is written to its log, one JSON line per step.
        healed: tensors of the emulator's blocks that earlier steps changed, keyed by their name in the base; training
            starts from them.

    Returns:
        All tensors of the emulator's blocks, keyed by their name in the base; the values are in a file of the scratch
        folder.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
        OffsiteError: the loss is no longer a finite number.
        KeyboardInterrupt: the user interrupted the run; a resume point was saved.
    """
    began = time.monotonic()
    model, sandwich, spec, scratch = healing.model, healing.sandwich, healing.spec, healing.scratch
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    batches = calibration_batches(model, spec.calibration.source, spec.distill.tokens, row_form(spec))
    states = middle_states(
        model, sandwich, batches, runtime, scratch / "states", healing.progress, "hidden states to distill from"
    )
    after = sandwich.top if spec.distill.ce else ()
    stack = BlockRunner(model, runtime).stack(healing.emulator, after, healed, whole=spec.distill.ce > 0)
    task = _Distillation(stack, states, spec, skipped=0 if model.family.vision else 1)
    weights = _emulator_weights(
        model, stack, healing.emulator, prunes=work_of(sandwich.middle, spec).pruner is not None
    )
    with run_log(healing.log) as write, seeded(spec.seed, runtime.device):
        state = RunState(scratch / "distill", {}, resume=True)
        steps = _step_count(task, weights, scratch / "distill-steps.json", began)
        train(task, weights, _loop_settings(task, steps), state, log=write, progress=healing.progress)
    file = scratch / "distilled.safetensors"
    file.unlink(missing_ok=True)
    tensors = in_files(model.family, weights.masters)
    write_safetensors(file, [to_new_tensor(name, tensor) for name, tensor in tensors.items()])
    return read_header(file)


def hidden_error(student: Tensor, teacher: Tensor, skipped: int = 1) -> Tensor:
    """The distillation error of hidden states: mean(((H_T - H_S) / rms(H_T))^2).

    `student` and `teacher` are (B, T, H); rms is computed for each token; the first `skipped` tokens are left out.
    """
    student, teacher = student[:, skipped:].float(), teacher[:, skipped:].float()
    scale = teacher.square().mean(-1, keepdim=True).clamp_min(1e-12)  # (B, T - skipped, 1)
    return ((teacher - student).square() / scale).mean()


def _emulator_weights(model: BaseModel, stack: LoadedStack, emulator: Sequence[int], *, prunes: bool) -> MasterWeights:
    """The trainable parameters of the emulator's blocks, with their copies in float32.

    Args:
        model: the opened base.
        stack: the loaded emulator.
        emulator: base indices of its blocks.
        prunes: whether the blocks were pruned; then the zeros of their linear layers stay zero.
    """
    starts = tuple(f"{model.family.block_module(index)}." for index in emulator)
    working = {name: parameter for name, parameter in sorted(stack.parameters.items()) if name.startswith(starts)}
    for parameter in working.values():
        parameter.requires_grad = True
    fixed = {name: value.detach() == 0 for name, value in working.items() if prunes and model.family.is_linear(name)}
    return MasterWeights(working, fixed=fixed)


@dataclass(frozen=True)
class _Distillation:
    """The distillation as a `TrainingTask` for the training loop; a "row" of the loop is one batch of hidden states."""

    unit: ClassVar[str] = "tokens"
    stack: LoadedStack
    states: MiddleStates
    spec: PackSpec
    skipped: int  # number of first tokens of a sample that are left out of the loss

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of the loss terms: the error of the hidden states, and the cross-entropy if it is on."""
        return {"error": HIDDEN_WEIGHT} | ({"ce": self.spec.distill.ce} if self.spec.distill.ce else {})

    @property
    def device(self) -> torch.device:
        """The device of the emulator's blocks."""
        return self.states.batches[0].device

    @property
    def held_out(self) -> list[int]:
        """Indices of the validation batches; empty if there are fewer batches than `HELD_OUT`."""
        return list(range(HELD_OUT - 1, len(self.states.batches), HELD_OUT))

    def order(self, epoch: int) -> list[list[int]]:
        """For each optimiser step of an epoch, the indices of its batches; they are shuffled with the seed."""
        held_out = set(self.held_out)
        trained = [position for position in range(len(self.states.batches)) if position not in held_out]
        width = max(1, self.spec.distill.batch_tokens // self.states.tokens[0])
        random.Random(f"{self.spec.seed} {epoch}").shuffle(trained)  # noqa: S311  no secret
        return [trained[at : at + width] for at in range(0, len(trained), width)]

    def micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Divide the batches of a step, whose indices are `rows`, into micro-batches of one batch each."""
        return [[position] for position in rows]

    def prefetch(self, rows: Sequence[int], epoch: int) -> None:
        """Do nothing: hidden states are read from disk when they are used."""

    def loss_terms(self, rows: Sequence[int], epoch: int) -> dict[str, Tensor]:
        """The loss terms of the one batch whose index is in `rows`; each is the mean over its tokens."""
        (position,) = rows
        ids, enters, leaves = self.states.at(position)
        if not self.spec.distill.ce:
            return {"error": hidden_error(self.stack(ids, enters), leaves, self.skipped)}
        student, nats = self.stack.to_the_end(ids, enters)
        return {"error": hidden_error(student, leaves), "ce": nats}

    def weight(self, rows: Sequence[int]) -> int:
        """The weight of these batches in the loss: their number, as all batches count equally."""
        return len(rows)

    def size(self, rows: Sequence[int]) -> dict[str, int]:
        """The number of tokens in these batches."""
        return {self.unit: sum(self.states.tokens[position] for position in rows)}

    def first_record(self) -> dict[str, float]:
        """The first record of the log: the mean loss terms on the held-out batches before this process trains."""
        return self._held_out_terms()

    def validate(self, progress: Progress, stage: str) -> dict[str, float]:
        """The mean of each loss term over the held-out batches; empty if there are no such batches."""
        return self._held_out_terms()

    @torch.no_grad()
    def _held_out_terms(self) -> dict[str, float]:
        """The mean of each loss term over the held-out batches; empty if there are no such batches."""
        terms = [self.loss_terms([position], 0) for position in self.held_out]
        return {name: fmean(float(one[name]) for one in terms) for name in self.term_weights} if terms else {}


def _step_count(task: _Distillation, weights: MasterWeights, file: Path, began: float) -> int:
    """The number of optimiser steps: from the settings, or as many as fit into the time limit of the settings.

    The number that fits is measured once and written to `file`, so a resumed run has the same learning rate schedule.

    Args:
        task: the distillation.
        weights: the trainable weights; the measurement does not change them.
        file: the file for the number of steps.
        began: `time.monotonic()` when the time limit began, before the base's hidden states were computed.
    """
    spec = task.spec
    if spec.distill.minutes is None:
        return spec.distill.steps or max(1, math.ceil(spec.distill.epochs * len(task.order(0))))
    if file.exists():
        return int(json.loads(file.read_bytes())["steps"])
    seconds = 0.0
    for _ in range(2):  # the first one also allocates memory
        start = time.monotonic()
        for position in task.order(0)[0]:
            terms = task.loss_terms([position], 0)
            torch.stack([task.term_weights[name] * term for name, term in terms.items()]).sum().backward()  # type: ignore[no-untyped-call]
        seconds = time.monotonic() - start
        for parameter in weights.working.values():
            parameter.grad = None
    left = 60 * spec.distill.minutes - (time.monotonic() - began)
    steps = max(1, int(left / seconds))
    replace_file(file, json.dumps({"steps": steps, "seconds_per_step": seconds}).encode())
    return steps


def _loop_settings(task: _Distillation, steps: int) -> LoopSettings:
    spec = task.spec
    return LoopSettings(
        steps=steps,
        learning_rate=lambda step: learning_rate(step, steps, peak=spec.distill.lr, warmup=WARMUP),
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        save_every=SAVE_EVERY,
        validates_after=lambda step: step == steps or step % VALIDATE_EVERY == 0,
        names=_NAMES,
    )
