"""The plan of a tuning: its steps, memory and files.

Sizes of weights are read from file headers; no model is loaded and nothing is written.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from offsite.config import Method, TuneSpec
from offsite.data.data_files import DataPaths
from offsite.data_owner.bundle_parts import bundle_parts
from offsite.data_owner.check_permissions import resolve_defaults
from offsite.data_owner.check_tuning import check_tuning
from offsite.data_owner.return_manifest import classifier_shapes, return_sizes, returned_tensors
from offsite.kernels.compute_dtypes import ITEM_BYTES
from offsite.models.plan_amounts import Amount, Compute, Measurement, Memory, Part, total
from offsite.progress import NOTE, Event, Progress, silent
from offsite.protocol.artifacts import Bundle
from offsite.protocol.home import Home
from offsite.protocol.manifest import BundleManifest
from offsite.storage.safetensors_files import FLOATS, TensorRange
from offsite.training.run_identity import require_same_run
from offsite.training.run_log import require_resume_asked, run_folder
from offsite.training.schedule import checkpoint_steps, describe_few_steps, step_count

if TYPE_CHECKING:
    from offsite.data_owner.tuning_data import TextData
    from offsite.data_owner.tuning_pictures import Album
    from offsite.kernels.runtime import Runtime


@dataclass(frozen=True)
class TunePlan:
    """The plan of a tuning: rows, steps, trained parameters, memory, and sizes of files."""

    architecture: str
    method: Method
    device: str
    compute: Compute
    rows: int  # number of training rows
    rows_left_out: int  # rows that are too long or without a label, or pictures that cannot be read
    held_out_rows: int
    longest_row: int  # in tokens; for pictures, the tokens of one picture
    steps: int
    returned_tensors: int
    trained_parameters: int
    bundle: tuple[Part, ...]
    memory: tuple[Memory, ...]  # memory for weights, gradients and moments during training
    files: tuple[Amount, ...]  # files of the return; sizes are exact, except for the digits of scores
    disk: tuple[Amount, ...]  # everything that needs space on the disk of the return's folder
    measured: Measurement | None = None

    @property
    def disk_bytes(self) -> int:
        """The bytes needed on the disk of the return's folder."""
        return total(self.disk)


@dataclass(frozen=True)
class Prepared:
    """The data and resolved settings that a plan was made from; `measure_tuning` uses them."""

    spec: TuneSpec
    runtime: "Runtime"
    data: "TextData | Album"
    source: DataPaths  # paths of the training rows

    @property
    def steps_of_epoch(self) -> int:
        """The number of optimiser steps in one epoch."""
        return math.ceil(self.data.rows / self.spec.length.batch_size)


def plan_tune(
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
) -> tuple[TunePlan, Prepared]:
    """Plan the tuning of a verified bundle. It refuses all that `tune` would refuse before loading the model.

    Rows are tokenised and pictures decoded as in the run, so the counts are those of the rows that will train. This
    imports torch and selects the same device as the run.

    Args:
        bundle: the verified bundle.
        data: the training rows.
        out: the return's folder.
        spec: the settings of the tuning.
        home: the data owner's home, with the key.
        eval_data: held-out rows; None if they are not a separate data set.
        tensorboard: a folder for an additional TensorBoard log; None for no such log.
        resume: whether to continue an interrupted run.
        progress: receives the progress events.

    Returns:
        The plan, and the data and settings that it was made from.

    Raises:
        OffsiteError: see `check_tuning` and `read_data`; also raised if there are fewer steps than checkpoints.
    """
    identity = check_tuning(bundle, data, out, spec, home, eval_data=eval_data, tensorboard=tensorboard, resume=resume)
    from offsite.data.pictures.picture_workers import PictureWorkers
    from offsite.data_owner.identity_of_tuning import identity_of_tuning
    from offsite.data_owner.tuning_data import read_data
    from offsite.kernels.runtime import resolve_runtime, usual_tokens_at_once, worker_count

    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    item = runtime.dtype.itemsize
    is_text = bundle.manifest.family.vision is None
    spec = resolve_defaults(spec, usual_tokens_at_once(runtime, text=is_text))
    progress(Event("reading the rows", 0))
    with PictureWorkers(worker_count(spec.images.workers, runtime.device)) as workers:
        read = read_data(bundle, data, eval_data, spec, progress, workers)
    steps = step_count(spec, read.rows)
    checkpoint_steps(spec, steps)
    if require_resume_asked(run_folder(out), resume=resume, restartable=True):
        require_same_run(run_folder(out), identity_of_tuning(bundle, data, eval_data, spec, runtime, several=False))
    if few := describe_few_steps(spec, steps, read.rows):
        progress(Event(f"{NOTE}{few}", 0))
    compute: Compute = "bf16" if item == ITEM_BYTES["bf16"] else "fp32"
    manifest, classes = bundle.manifest, read.classes
    classifier = _count(classifier_shapes(manifest, len(classes))) if classes else 0
    returned = returned_tensors(manifest, spec)
    trained = _count({name: entry.shape for name, entry in returned.items()}) + classifier
    tensors = bundle.files.checkpoint().tensors
    files = return_sizes(bundle, spec, identity.public_key.hex, classes)
    written = tuple(Amount(name, size) for name, size in sorted(files.items()))
    plan = TunePlan(
        architecture=manifest.architecture,
        method=spec.adapter.method,
        device=str(runtime.device),
        compute=compute,
        rows=read.rows,
        rows_left_out=read.left_out,
        held_out_rows=read.held_out_rows,
        longest_row=read.longest_row,
        steps=steps,
        returned_tensors=len(returned) + (2 if classes else 0),
        trained_parameters=trained,
        bundle=bundle_parts(manifest, tensors),
        memory=(Memory(compute, _weights(manifest, spec, tensors, trained, classifier, compute)),),
        files=written,
        disk=(
            Amount("return", total(written)),
            Amount("resume points, the old and the new", 24 * trained),
            *_earlier_checkpoints(spec, trained - classifier),
            *_features(manifest, spec, read, item, steps),
        ),
    )
    return plan, Prepared(spec, runtime, read, data)


def _weights(
    manifest: BundleManifest,
    spec: TuneSpec,
    tensors: Mapping[str, TensorRange],
    trained: int,
    classifier: int,
    compute: Compute,
) -> tuple[Amount, ...]:
    """The memory for weights, gradients and AdamW's two moments, all of which is needed from the first step on.

    Args:
        manifest: the bundle's manifest.
        spec: the settings of the tuning.
        tensors: the tensors in the bundle's weights, by name.
        trained: the number of trained parameters, including those of a classifier.
        classifier: the number of a classifier's parameters.
        compute: the compute dtype.
    """
    item = ITEM_BYTES[compute]
    stored = sum(item * math.prod(t.shape) if t.dtype in FLOATS else t.size for t in tensors.values())
    amounts = [Amount(f"weights of the bundle in {compute}", stored)]
    if spec.adapter.method in ("lora", "bottleneck"):  # new tensors; a trained head is part of the bundle's weights
        head = sum(math.prod(entry.shape) for entry in manifest.head.values()) if spec.adapter.tune_head else 0
        amounts.append(Amount(f"adapter in {compute}", item * (trained - classifier - head)))
    if classifier:
        amounts.append(Amount("classifier in fp32", 4 * classifier))
    if item < 4:
        amounts.append(Amount("master weights in fp32", 4 * (trained - classifier)))
        amounts.append(Amount(f"gradients of a micro-batch in {compute}", item * (trained - classifier)))
    return (
        *amounts,
        Amount("gradients in fp32", 4 * trained),
        Amount("optimiser moments in fp32", 8 * trained),
    )


def _earlier_checkpoints(spec: TuneSpec, trained: int) -> tuple[Amount, ...]:
    """The disk space of all checkpoints except the last one, in the run's folder; empty if there is only one.

    `trained` is the number of trained parameters.
    """
    earlier = spec.points.checkpoints - 1
    return (Amount("earlier checkpoints, in the run's folder", 4 * trained * earlier),) if earlier else ()


def _features(
    manifest: BundleManifest, spec: TuneSpec, read: "TextData | Album", item: int, steps: int
) -> tuple[Amount, ...]:
    """The disk space of the feature cache; empty if the run will not cache features.

    Args:
        manifest: the bundle's manifest.
        spec: the settings of the tuning.
        read: the rows or pictures that train.
        item: bytes per value in the compute dtype.
        steps: the number of optimiser steps of the run.
    """
    several_epochs = steps > math.ceil(read.rows / spec.length.batch_size)
    if spec.memory.cache_features == "off" or not manifest.split.trained[0] or not several_epochs or read.classes:
        return ()
    return (Amount("states before the first trained block, at most", read.total_tokens * manifest.hidden * item),)


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of parameters in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())
