"""`offsite tune --plan measure`: trains two steps on the longest rows with the real model, and saves nothing."""

import contextlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from offsite.config import TuneSpec
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data_owner.feature_cache import cached_features
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.plan import Prepared, TunePlan
from offsite.data_owner.prepare_model import prepare_model
from offsite.data_owner.sent_bundle import as_sent
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning, train
from offsite.data_owner.tuning_data import TextData, read_data
from offsite.kernels.peak_memory import peak_memory
from offsite.kernels.runtime import seeded, worker_count
from offsite.models.plan_amounts import Measurement
from offsite.progress import Event, Progress
from offsite.protocol.artifacts import Bundle
from offsite.training.resume_points import RunState

_STEPS = 2  # the first step also compiles kernels and fills caches; the second step is timed
_NO_SAVING: dict[str, Any] = {"max_steps": _STEPS + 1, "save_every": 10**9, "eval_every": None, "checkpoints": 1}


class _Measured(Exception):  # noqa: N818  a signal, caught where it is raised for
    """Raised to end the run after the measured steps, so that nothing is saved."""


def measure_tuning(bundle: Bundle, plan: TunePlan, prepared: Prepared, progress: Progress) -> TunePlan:
    """Load the model, train on a step of the longest rows, and add the measured memory and time to a plan.

    Memory is the peak of the process, including optimiser moments; validation is not run. Files are written to a
    temporary folder, which is removed.

    Args:
        bundle: the verified bundle.
        plan: the plan, from `plan_tune`.
        prepared: the data and settings of the plan, from `plan_tune`.
        progress: receives the progress events.

    Raises:
        UsageError: this system does not report a process's memory, or the tuning does not fit into the setting
            `memory`.
        IncompatibleError: the bundle does not load.
        OffsiteError: the training diverged.
    """
    runtime, spec, seconds = prepared.runtime, _measured_spec(plan, prepared), list[float]()
    loaded: list[Tuning] = []

    def load() -> None:
        progress(Event("loading the model", 0))
        loaded.append(prepare_model(bundle, data, spec, runtime, progress))

    def clock(event: Event) -> None:
        if event.stage != "tuning":
            return
        seconds.append(time.perf_counter())
        if len(seconds) == _STEPS:
            raise _Measured

    with contextlib.ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="offsite-plan-")))
        opened.enter_context(seeded(spec.seed, runtime.device))
        opened.enter_context(as_sent())
        data = prepared.data
        if not isinstance(data, TextData):  # the workers that decoded pictures for the plan have ended
            workers = opened.enter_context(PictureWorkers(worker_count(spec.images.workers, runtime.device)))
            data = read_data(bundle, prepared.source, None, spec, progress, workers)
        _, loading = peak_memory(load, runtime.device)
        (whole,) = loaded
        tuning = _longest_rows(whole, spec)
        with cached_features(tuning, spec, folder, progress):
            fitted = within_memory(whole, spec, runtime, folder / "memory.json", progress)
            progress(Event("measuring", 0))

            def run() -> None:
                with contextlib.suppress(_Measured):
                    train(tuning, fitted.spec, RunState(folder, {}, resume=False), folder / "log.jsonl", clock)

            _, training = peak_memory(run, runtime.device)
    what, times = f"a step of {min(spec.length.batch_size, plan.rows)} pictures", float(plan.steps)
    if isinstance(tuning.task, TextTask):
        what = f"a step of the {tuning.task.rows} longest rows"
        tokens = sum(len(example.ids) for example in tuning.task.examples)
        times = plan.steps / prepared.steps_of_epoch * data.total_tokens / tokens
    return replace(
        plan,
        measured=Measurement(
            what=what,
            device=str(runtime.device),
            compute=plan.compute,
            peak_bytes=max(loading, training),
            seconds=seconds[1] - seconds[0],
            times=times,
        ),
    )


def _measured_spec(plan: TunePlan, prepared: Prepared) -> TuneSpec:
    """The settings of the run, except that it is short and saves nothing."""
    settings = dict(_NO_SAVING)
    if plan.steps <= prepared.steps_of_epoch:  # each row runs once, so the run caches no features
        settings["cache_features"] = "off"
    return prepared.spec.changed({**settings, "report_scores": False})


def _longest_rows(tuning: Tuning, spec: TuneSpec) -> Tuning:
    """The same tuning on only the longest rows, enough for one step.

    A tuning on pictures stays as it is, since all its pictures have the same size.
    """
    if not isinstance(tuning.task, TextTask):
        return tuning
    longest = sorted(tuning.task.examples, key=lambda example: -len(example.ids))[: spec.length.batch_size]
    return replace(tuning, task=replace(tuning.task, examples=longest, held_out=()))
