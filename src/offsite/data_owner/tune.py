"""Tuning: take a verified bundle, train its adapter on one's own rows, and write the signed return."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.config import TuneSpec
from offsite.data.picture_files import pictures_digest, read_pictures
from offsite.data.picture_workers import PictureWorkers
from offsite.data.row_files import data_digest
from offsite.data_owner.check_tuning import AT_WORK, check_tuning
from offsite.data_owner.feature_cache import cached_features
from offsite.data_owner.image_task import Album, ImageTask, head_parameters, new_head
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.methods import METHODS
from offsite.data_owner.methods.trained_head import attach_head
from offsite.data_owner.permissions import resolve_defaults
from offsite.data_owner.returned_checkpoints import Checkpoints
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning, train
from offsite.data_owner.tuning_data import TextData, read_data
from offsite.data_owner.write_return import send_back
from offsite.kernels.cpu.fused_modules import fuse
from offsite.kernels.cpu.lora_linear import replace_lora_layers
from offsite.kernels.cpu.tiled_attention import use_tiled_attention
from offsite.kernels.runtime import Runtime, runtime, seeded, worker_count
from offsite.models.architectures import ARCHITECTURES
from offsite.models.backbone import split_backbone_and_head
from offsite.models.image_encoder import BIAS, WEIGHT, encoder_of
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Bundle, Return
from offsite.protocol.home import Home
from offsite.storage.lock import alone_in
from offsite.training.master_weights import MasterWeights
from offsite.training.resume_points import RunState
from offsite.training.run_log import log_file, run_folder
from offsite.training.schedule import checkpoint_steps, step_count
from offsite.training.task import Batching

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Settings that do not change what comes out, so a resumed run may have others.
_FREE_SETTINGS = frozenset({"save_every", "eval_every", "threads", "workers"})


def tune(
    bundle: Bundle,
    data: Path,
    out: Path,
    spec: TuneSpec,
    home: Home,
    *,
    eval_data: Path | None = None,
    tensorboard: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Return:
    """Train the bundle's adapter on rows that stay here, and write the return.

    Beside `out` lie `<out>.log.jsonl`, the log, and while it runs `<out>.run/`, the resume points.

    Args:
        bundle: what the model's owner sent, verified.
        data: rows to train on, as `offsite.data.rows.read_rows` takes them.
        out: the return's folder; it appears whole or not at all.
        spec: what trains and how.
        home: the data owner's.
        eval_data: rows to validate on; needed where the return is to tell the checkpoints' losses.
        tensorboard: a folder to log to for TensorBoard as well; it stays here, like the log.
        resume: continue an interrupted run bit for bit (on the same machine with as many threads); where there is
            none yet, start.
        progress: where the events go.

    Raises:
        UsageError: `out` holds something, there are fewer steps than checkpoints, or losses to be told and no rows
            to measure them on, the tuning does not fit into `memory`, another one is at work there, an interrupted
            run is there that cannot or was not to be resumed, a package that was asked for is not installed, or
            TensorBoard's folder is where the return or its run will be.
        PolicyError: the bundle does not permit the method or the rank.
        DataError: rows are bad, too long, or missing.
        IncompatibleError: the bundle does not load, has nothing that the method trains, other tensors than its
            manifest says, or a tokenizer of more tokens than its model knows.
        OffsiteError: the training diverged.
        StorageError: something cannot be read or written.
        KeyboardInterrupt: the user stopped it; a resume point was saved.
    """
    identity = check_tuning(bundle, out, spec, home, eval_data=eval_data, tensorboard=tensorboard, resume=resume)
    out = out.resolve()  # the return takes the place of an empty folder, also of the one that one stands in
    where = runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    spec = resolve_defaults(spec, bundle.manifest.architecture, where.dtype.itemsize)
    with PictureWorkers(worker_count(spec.images.workers, where.device)) as workers:
        progress(Event("reading the rows", 0))
        rows = read_data(bundle, data, eval_data, spec, progress, workers)
        steps = step_count(spec, rows.rows)
        checkpoint_steps(spec, steps)  # refused before the run has a folder
        identity_of_run = _identity_of_run(bundle, data, eval_data, spec, where)
        with alone_in(run_folder(out), *AT_WORK), seeded(spec.seed, where.device):
            state = RunState(run_folder(out), identity_of_run, resume=resume, points_alone=True)
            checkpoints = Checkpoints(state, spec, steps)
            progress(Event("loading the model", 0))
            tuning = _prepare(bundle, spec, where, rows, progress)
            with cached_features(tuning, spec, state.folder, progress):
                fitted = within_memory(tuning, spec, where, state.folder / "memory.json", progress)
                train(tuning, fitted, state, checkpoints, log_file(out), progress, tensorboard=tensorboard)
            progress(Event("writing the return", 0))
            classes = rows.classes if isinstance(rows, Album) else None
            head = {name: master for name, master in tuning.weights.masters.items() if name in (WEIGHT, BIAS)}
            returned = send_back(bundle, {**tuning.returned, **head}, spec, out, identity, checkpoints, classes)
            state.remove()
    return returned


def _identity_of_run(
    bundle: Bundle, data: Path, eval_data: Path | None, spec: TuneSpec, where: Runtime
) -> dict[str, object]:
    settings = spec.flat(without=_FREE_SETTINGS)
    resolved = {"device": str(where.device), "compute": str(where.dtype)}
    told = {"eval_data": data_digest(eval_data)} if eval_data and spec.points.report_scores else {}
    if ARCHITECTURES[bundle.manifest.architecture].vision is None:
        digest = data_digest(data)
    else:  # a table of pictures names files that may have become others
        digest = pictures_digest(read_pictures(data, part="train"))
    return {**settings, **resolved, "bundle": bundle.digest, "data": digest, **told}


def _prepare(bundle: Bundle, spec: TuneSpec, where: Runtime, data: TextData | Album, progress: Progress) -> Tuning:
    if isinstance(data, Album):
        return _prepare_images(bundle, spec, where, data, progress)
    model = load_model(bundle.folder, dtype=where.dtype, device=where.device)
    network = split_backbone_and_head(model)
    attached = _attach(model, bundle, spec)
    working = attached | attach_head(model, bundle.manifest, spec)
    weights = MasterWeights(working, decayed=_decayed(bundle, spec, working))
    return _tuning(bundle, spec, model, weights, TextTask(network, data.examples, data.held_out, Batching.of(spec)))


def _prepare_images(bundle: Bundle, spec: TuneSpec, where: Runtime, album: Album, progress: Progress) -> Tuning:
    model = load_model(bundle.folder, dtype=where.dtype, device=where.device)
    encoder = encoder_of(model)
    used = encoder.read_by(spec.images.pooling)
    head = new_head(encoder, album, used, spec, progress)
    classifier = head_parameters(head)
    attached = _attach(model, bundle, spec)
    weights = MasterWeights(
        attached | classifier,
        decayed=_decayed(bundle, spec, attached) | {WEIGHT},
        rate_factors=dict.fromkeys(classifier, spec.head_factor),
    )
    task = ImageTask(encoder, head, used, album, spec.images.augment, Batching.of(spec))
    return _tuning(bundle, spec, model, weights, task)


def _attach(model: "PreTrainedModel", bundle: Bundle, spec: TuneSpec) -> dict[str, "nn.Parameter"]:
    """Make the model fast to train, and attach what trains: by the names under which it is returned."""
    fuse(model)
    use_tiled_attention(model)
    attached = METHODS[spec.adapter.method](model, bundle.manifest, spec)
    replace_lora_layers(model)
    return attached


def _decayed(bundle: Bundle, spec: TuneSpec, names: Iterable[str]) -> frozenset[str]:
    """Which trained parameters decay: matrices of linear layers and of the head, and no norm or bias."""
    row = ARCHITECTURES[bundle.manifest.architecture]
    adds_layers = spec.adapter.method in ("lora", "bottleneck")  # of linear layers alone
    return frozenset(
        name
        for name in names
        if row.is_linear(name) or (adds_layers and name.endswith(".weight")) or name == f"{row.head_module}.weight"
    )


def _tuning(
    bundle: Bundle, spec: TuneSpec, model: "PreTrainedModel", weights: MasterWeights, task: TextTask | ImageTask
) -> Tuning:
    manifest, row = bundle.manifest, ARCHITECTURES[bundle.manifest.architecture]
    blocks = model.get_submodule(row.module_blocks or row.blocks)
    own = {name: master for name, master in weights.masters.items() if name not in (WEIGHT, BIAS)}
    return Tuning(
        task=task,
        blocks=blocks,
        trained=[blocks.get_submodule(str(index)) for index in manifest.split.trained],
        weights=weights,
        returned=in_files(row, own) if spec.adapter.method in ("full", "bitfit") else own,
    )
