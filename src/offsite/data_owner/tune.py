"""Tuning: trains the adapter of a verified bundle on the data owner's rows, and writes the signed return."""

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import offsite
from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths, data_digest
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data_owner.audit_traps.trap_audit import audit_model
from offsite.data_owner.check_permissions import resolve_defaults
from offsite.data_owner.check_tuning import AT_WORK, check_tuning
from offsite.data_owner.feature_cache import cached_features
from offsite.data_owner.finished_run import own_return, record_finished, require_same_finished_run
from offsite.data_owner.identity_of_tuning import identity_of_tuning
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.prepare_model import prepare_model
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.data_owner.sent_bundle import Watched, as_sent
from offsite.data_owner.train import train
from offsite.data_owner.tuning_data import read_data
from offsite.data_owner.write_return import write_return
from offsite.errors import OffsiteError
from offsite.kernels.runtime import resolve_runtime, seeded, usual_tokens_at_once, worker_count
from offsite.progress import NOTE, Event, Progress, silent
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.home import Home
from offsite.protocol.signing import Identity
from offsite.storage.files import discard_folder
from offsite.storage.lock import alone_in
from offsite.training.processes import ONE, Processes
from offsite.training.resume_points import RunState
from offsite.training.run_log import log_file, run_folder
from offsite.training.schedule import checkpoint_steps, describe_few_steps, step_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tune(
    bundle: Bundle,
    data: DataPaths,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: DataPaths | None = None,
    tensorboard: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Return:
    """Train the bundle's adapter on rows that stay on this machine, and write the return.

    Before it trains, it runs the quick part of the audit for traps, and a progress event says what that found.

    Next to `out` are the log, `<out>.log.jsonl`, and until the return is complete the resume points, `<out>.run/`. If
    `resume` is True and the run is finished, its return is verified and returned, and nothing trains.

    Args:
        bundle: the verified bundle from the model's owner.
        data: the training rows, as `offsite.data.read_rows.read_rows` reads them.
        out: the return's folder; it appears complete or not at all.
        spec: the settings of the tuning.
        home: the data owner's home, with the key.
        eval_data: held-out rows, required if the return reports the checkpoints' losses; None if they are not a
            separate data set.
        tensorboard: a folder for an additional TensorBoard log, which stays on this machine; None for no such log.
        resume: whether to continue an interrupted run bit for bit (on the same machine with the same number of
            threads); if there is none, a new run starts.
        progress: receives the progress events.

    Raises:
        UsageError: `out` is not empty, or holds the return of another run; there are fewer steps than checkpoints;
            losses are to be reported but there are no held-out rows; the tuning does not fit into the setting `memory`;
            another tuning runs there; it has an interrupted run that cannot be resumed, or `resume` is False; a
            required package is not installed; the bundle is not addressed to this home; or TensorBoard's folder is
            inside the folder of the return or of its run.
        PolicyError: the bundle does not permit the method or the rank.
        DataError: rows are invalid, too long, or missing.
        IncompatibleError: the bundle does not load, has nothing for the method to train, does not have the tensors that
            its manifest lists, or has a tokenizer with more tokens than its model knows.
        OffsiteError: the training diverged.
        StorageError: a file cannot be read or written.
        KeyboardInterrupt: the user stopped the run; a resume point was saved.
    """
    if resume and (finished := finished_return(bundle, data, out, spec, home, eval_data=eval_data)):
        return finished
    returned = tune_in_processes(
        bundle,
        data,
        out,
        spec,
        home,
        eval_data=eval_data,
        tensorboard=tensorboard,
        resume=resume,
        progress=progress,
        processes=ONE,
    )
    assert returned is not None  # only None in further processes
    return returned


def tune_in_processes(
    bundle: Bundle,
    data: DataPaths,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: DataPaths | None,
    tensorboard: Path | None,
    resume: bool,
    progress: Progress,
    processes: Processes,
) -> Return | None:
    """Do the work of one of several processes that tune together; the arguments and errors are those of `tune`.

    Args:
        bundle: the verified bundle.
        data: the training rows; every process reads all of them.
        out: the return's folder. Only the first process writes, so other processes need not see this folder.
        spec: the settings of the tuning.
        home: the data owner's home, with the key; every process needs it, since it verified the bundle with it.
        eval_data: held-out rows; None if they are not a separate data set.
        tensorboard: a folder for an additional TensorBoard log; None for no such log.
        resume: whether to continue an interrupted run; exactly, if there are as many processes as before.
        progress: receives the progress events.
        processes: the processes.

    Returns:
        The return; None in every process but the first.

    Raises:
        OffsiteError: in every process, if the tuning fails in one of them.
    """
    identity: Identity | None = None
    out = out.resolve()  # the return replaces an empty folder, which may be the current one
    with contextlib.ExitStack() as opened:
        with processes.together():
            if processes.first:
                identity = check_tuning(
                    bundle, data, out, spec, home, eval_data=eval_data, tensorboard=tensorboard, resume=resume
                )
            place = processes.place
            number = place.local_rank if place.local_count > 1 else None
            runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads, process=number)
            usual = usual_tokens_at_once(runtime, text=bundle.manifest.family.vision is None)
        spec = resolve_defaults(spec, min(processes.gather(usual)))
        with processes.together():
            count = worker_count(spec.images.workers, runtime.device, place.local_count)
            workers = opened.enter_context(PictureWorkers(count))
            progress(Event("reading the rows", 0))
            rows = read_data(bundle, data, eval_data, spec, progress, workers)
            steps = step_count(spec, rows.rows)
            checkpoint_steps(spec, steps)  # refuses too few steps before the run has a folder
            if few := describe_few_steps(spec, steps, rows.rows):
                progress(Event(f"{NOTE}{few}", 0))
            several = processes.count > 1
            identity_of_run = identity_of_tuning(bundle, data, eval_data, spec, runtime, several=several)
            compared = {**identity_of_run, **_further_compared(eval_data)} if several else {}
        processes.require_same(compared)
        folder, log = run_folder(out), log_file(out)
        checkpoints = Checkpoints(folder, spec, steps)
        state: RunState | None = None
        with processes.together():
            if processes.first:
                opened.enter_context(alone_in(folder, *AT_WORK))
                state = RunState(folder, identity_of_run, resume=resume, restartable=True)
                opened.enter_context(_removed_unless_resumable(state))
        opened.enter_context(seeded(spec.seed, runtime.device))
        opened.enter_context(_memory_errors(runtime.device))
        progress = watched = Watched(progress)
        with processes.together(), as_sent(watched), _memory_errors(runtime.device):
            progress(Event("loading the model", 0))
            audit = partial(_audit, bundle, progress) if processes.first else None
            tuning = prepare_model(bundle, rows, spec, runtime, progress, processes, audit)
        progress(Event(tuning.kernels.in_words(), 0))
        with (
            as_sent(watched),
            _memory_errors(runtime.device),
            cached_features(tuning, spec, folder, progress) as cached,
        ):
            fitted = within_memory(tuning, spec, runtime, folder / "memory.json", progress)
            tuning = replace(tuning, kernels=tuning.kernels.with_pieces(cached, *fitted.pieces))
            train(tuning, fitted.spec, state, log, progress, checkpoints=checkpoints, tensorboard=tensorboard)
        returned: Return | None = None
        with processes.together():
            if state is not None and identity is not None:
                progress(Event("writing the return", 0))
                returned = write_return(bundle, tuning.returned, spec, out, identity, checkpoints, rows.classes)
                record_finished(returned, identity_of_run)
    return returned


@contextlib.contextmanager
def _removed_unless_resumable(state: RunState) -> Iterator[None]:
    """Context manager: remove the run's folder at the end of the body, unless a resume point remains to continue from.

    The folder may hold hidden states of the data.
    """
    try:
        yield
    except BaseException:
        if not state.resumable:
            state.remove()
        raise
    state.remove()


def _audit(bundle: Bundle, progress: Progress, model: "PreTrainedModel") -> None:
    """Run the quick part of the audit for traps on the loaded model, and report what it found as a progress event."""
    found = audit_model(model, bundle.manifest, quick=True)
    progress(Event(found.in_words(), 0))


def finished_return(
    bundle: Bundle,
    data: DataPaths,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: DataPaths | None = None,
    several: bool = False,
) -> Return | None:
    """The return of a tuning that is already finished; None if `out` does not hold a return of this home.

    Args:
        bundle: the verified bundle.
        data: the training rows.
        out: the return's folder.
        spec: the settings of the tuning.
        home: the data owner's home, with the key.
        eval_data: held-out rows; None if they are not a separate data set.
        several: whether several processes tune together.

    Raises:
        UsageError: the return was made with other settings, from another bundle or from other data, or the log that
            would say so is missing.
        DataError: the data cannot be read.
    """
    returned = own_return(out, home)
    if returned is None:
        return None
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    usual = usual_tokens_at_once(runtime, text=bundle.manifest.family.vision is None)
    spec = resolve_defaults(spec, usual)
    identity = identity_of_tuning(bundle, data, eval_data, spec, runtime, several=several)
    require_same_finished_run(returned, identity)
    if run_folder(out).exists():  # the run was interrupted just after it had written the return
        record_finished(returned, identity)
        discard_folder(run_folder(out))
    return returned


@contextlib.contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Context manager: that a device has too little memory becomes an error that says what to do.

    Raises:
        OffsiteError: the device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OffsiteError(
            f"{device} has too little memory for this tuning",
            reasons=[str(error).strip().splitlines()[0][:200]],
            next_step="give --memory, --gradient-checkpointing, or a lower micro_batch_tokens in table [tune] of a "
            "--config file; if the model itself does not fit, start several processes with --shard blocks",
        ) from None


def _further_compared(eval_data: DataPaths | None) -> dict[str, object]:
    """What must be the same in all processes of a run, but may change when it is resumed."""
    versions = {"offsite": offsite.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "eval_data": data_digest(eval_data) if eval_data else ""}
