"""Tuning: trains the adapter of a verified bundle on the data owner's rows, and writes the signed return."""

from dataclasses import replace
from pathlib import Path

from offsite.config import TuneSpec
from offsite.data.data_files import DataPaths, data_digest
from offsite.data.pictures.picture_sets import pictures_digest, read_pictures
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data_owner.check_permissions import resolve_defaults
from offsite.data_owner.check_tuning import AT_WORK, check_tuning
from offsite.data_owner.feature_cache import cached_features
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.prepare_model import prepare_model
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.data_owner.train import train
from offsite.data_owner.tuning_data import read_data
from offsite.data_owner.write_return import write_return
from offsite.kernels.runtime import Runtime, resolve_runtime, seeded, worker_count
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.home import Home
from offsite.storage.lock import alone_in
from offsite.training.resume_points import RunState
from offsite.training.run_log import log_file, run_folder
from offsite.training.schedule import checkpoint_steps, step_count

# Settings that do not change the result, so a resumed run may have other values.
_FREE_SETTINGS = frozenset({"save_every", "eval_every", "threads", "workers"})


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

    Next to `out` are the log, `<out>.log.jsonl`, and until the return is complete the resume points, `<out>.run/`.

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
        UsageError: `out` is not empty; there are fewer steps than checkpoints; losses are to be reported but there are
            no held-out rows; the tuning does not fit into the setting `memory`; another tuning runs there; it has an
            interrupted run that cannot be resumed, or `resume` is False; a required package is not installed; or
            TensorBoard's folder is inside the folder of the return or of its run.
        PolicyError: the bundle does not permit the method or the rank.
        DataError: rows are invalid, too long, or missing.
        IncompatibleError: the bundle does not load, has nothing for the method to train, does not have the tensors that
            its manifest lists, or has a tokenizer with more tokens than its model knows.
        OffsiteError: the training diverged.
        StorageError: a file cannot be read or written.
        KeyboardInterrupt: the user stopped the run; a resume point was saved.
    """
    identity = check_tuning(bundle, data, out, spec, home, eval_data=eval_data, tensorboard=tensorboard, resume=resume)
    out = out.resolve()  # the return replaces an empty folder, which may be the current one
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    spec = resolve_defaults(spec, bundle.manifest.family, runtime.dtype.itemsize)
    with PictureWorkers(worker_count(spec.images.workers, runtime.device)) as workers:
        progress(Event("reading the rows", 0))
        rows = read_data(bundle, data, eval_data, spec, progress, workers)
        steps = step_count(spec, rows.rows)
        checkpoint_steps(spec, steps)  # refuses too few steps before the run has a folder
        identity_of_run = _identity_of_run(bundle, data, eval_data, spec, runtime)
        with alone_in(run_folder(out), *AT_WORK), seeded(spec.seed, runtime.device):
            state = RunState(run_folder(out), identity_of_run, resume=resume, restartable=True)
            checkpoints = Checkpoints(state, spec, steps)
            progress(Event("loading the model", 0))
            tuning = prepare_model(bundle, rows, spec, runtime, progress)
            progress(Event(tuning.kernels.in_words(), 0))
            with cached_features(tuning, spec, state.folder, progress) as cached:
                fitted = within_memory(tuning, spec, runtime, state.folder / "memory.json", progress)
                tuning = replace(tuning, kernels=tuning.kernels.with_pieces(cached, *fitted.pieces))
                log = log_file(out)
                train(tuning, fitted.spec, state, log, progress, checkpoints=checkpoints, tensorboard=tensorboard)
            progress(Event("writing the return", 0))
            returned = write_return(bundle, tuning.returned, spec, out, identity, checkpoints, rows.classes)
            state.remove()
    return returned


def _identity_of_run(
    bundle: Bundle, data: DataPaths, eval_data: DataPaths | None, spec: TuneSpec, runtime: Runtime
) -> dict[str, object]:
    """Settings, bundle and data of a run, by name. A run is only resumed if all of these are the same."""
    settings = spec.flat(without=_FREE_SETTINGS)
    resolved = {"device": str(runtime.device), "compute": str(runtime.dtype)}
    reported = {"eval_data": data_digest(eval_data)} if eval_data and spec.points.report_scores else {}
    if bundle.manifest.family.vision is None:
        digest = data_digest(data)
    else:  # the content of the picture files counts, since a table of pictures holds only their names
        digest = pictures_digest(read_pictures(data, part="train", columns=spec.rows.columns))
    return {**settings, **resolved, "bundle": bundle.digest, "data": digest, **reported}
