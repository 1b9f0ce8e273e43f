"""Full fine-tuning: every weight of the base, embeddings, norms and head included. What no party of the protocol can
do, and what its plug-ins are compared with; the loop is the data owner's own. An encoder becomes an image classifier
with a head for the classes of the pictures, as a plug-in is one.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from offsite.config import TuneSpec
from offsite.data.picture_files import Floats
from offsite.data.picture_workers import PictureWorkers
from offsite.data.row_files import data_digest
from offsite.data.rows import read_rows
from offsite.data.tokens import Example, encode
from offsite.data_owner.album import Album, open_album
from offsite.data_owner.image_task import ImageTask, head_parameters, new_head
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.text_task import TextTask
from offsite.data_owner.train import Tuning, train
from offsite.kernels import Piece, Report, backend_of, keep_activations, prepare
from offsite.kernels.runtime import resolve_runtime, seeded, worker_count
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.image_classifier import classifier_config
from offsite.models.architectures import Architecture
from offsite.models.backbone import split_backbone_and_head
from offsite.models.image_encoder import WEIGHT, Encoder, encoder_of
from offsite.models.library_calls import quiet
from offsite.models.loading import load_model
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import CONFIG, PROCESSOR, TOKENIZER_FILES
from offsite.storage.files import require_free, staged_folder, write_stream
from offsite.storage.safetensors_files import from_array, write_checkpoint
from offsite.training.master_weights import MasterWeights
from offsite.training.resume_points import RunState
from offsite.training.run_log import log_file, run_folder
from offsite.training.task import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def full_fine_tuning(
    base: Base,
    data: Path,
    out: Path,
    spec: TuneSpec,
    *,
    eval_data: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Base:
    """Train all of a base model on rows, and write the tuned model.

    Args:
        base: the model; it is only read.
        data: rows to train on.
        out: the tuned checkpoint's folder, in the dtype of the arithmetic; it appears whole or not at all.
        spec: how to train; what a method would choose is not looked at.
        eval_data: rows to validate on.
        resume: continue an interrupted run; where there is none yet, start.
        progress: where the events go.

    Raises:
        UsageError: `out` holds something, or another run than this one was interrupted there.
        DataError: rows are bad, too long, or missing.
        IncompatibleError: the base does not load.
        OffsiteError: the training diverged.
        StorageError: something cannot be read or written.
        KeyboardInterrupt: the user stopped it; a resume point was saved.
    """
    require_free(out)
    opened = open_base(base)
    row = opened.row
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    with PictureWorkers(worker_count(spec.images.workers, runtime.device)) as workers:
        vision = row.vision is not None
        album = open_album(base.folder, data, eval_data, spec, progress, workers) if vision else None
        examples, held_out = ((), ()) if album else (_read(base, data, spec), _read(base, eval_data, spec))
        with seeded(spec.seed, runtime.device):
            run = {
                **spec.flat(without=("workers",)),
                "base": str(base.folder.resolve()),
                "data": data_digest(data),
            }
            state = RunState(run_folder(out), {**run, "compute": str(runtime.dtype)}, resume=resume)
            progress(Event("loading the model", 0))
            model = load_model(base.folder, dtype=runtime.dtype, device=runtime.device)
            if album is None:
                tuning = _prepare(model, row, examples, held_out, spec)
            else:
                tuning = _prepare_images(model, row, album, spec, progress)
            progress(Event(tuning.kernels.in_words(), 0))
            alone = spec.changed({"lanes": 1})  # lanes would each hold a gradient of the whole model
            fitted = within_memory(tuning, alone, runtime, state.folder / "memory.json", progress)
            tuning = replace(tuning, kernels=tuning.kernels.with_pieces(*fitted.pieces))
            train(tuning, fitted.spec, state, log_file(out), progress)
    keep_activations(tuning.blocks)  # which puts the blocks' own names back
    progress(Event("writing the tuned model", 0))
    if isinstance(tuning.task, ImageTask):
        _write_classifier(tuning.task, opened, "BF16" if runtime.dtype == torch.bfloat16 else "F32", out)
    else:
        _write(model, base, out)
    state.remove()
    return Base(out)


def _read(base: Base, data: Path | None, spec: TuneSpec) -> tuple[Example, ...]:
    if data is None:
        return ()
    longest = min(spec.rows.max_length, context_length(base.folder) or spec.rows.max_length)
    tokenizer = load_tokenizer(base.folder)
    return encode(read_rows(data), tokenizer, source=data, max_length=longest, long_rows=spec.rows.long_rows).examples


def _prepare(
    model: "PreTrainedModel",
    row: Architecture,
    examples: tuple[Example, ...],
    held_out: tuple[Example, ...],
    spec: TuneSpec,
) -> Tuning:
    network = split_backbone_and_head(model)
    report = prepare(model, model.device, model.dtype)
    model.requires_grad_(True)
    working = dict(model.named_parameters())  # a tied head is the embedding, and is there once
    matrices = {*(name for name, sizes in row.embeddings.items() if " " in sizes), row.head}  # and no norm among them
    return Tuning(
        task=TextTask(network, examples, held_out, Batching.of(spec)),
        blocks=model.get_submodule(row.blocks),
        trained=[model],  # dropout runs everywhere
        weights=MasterWeights(working, decayed=[name for name in working if name in matrices or row.is_linear(name)]),
        returned={},  # to nobody
        kernels=report,
    )


def _prepare_images(
    model: "PreTrainedModel", row: Architecture, album: Album, spec: TuneSpec, progress: Progress
) -> Tuning:
    encoder = encoder_of(model)
    used = encoder.read_by(spec.images.pooling)
    head = new_head(encoder, album, used, spec, progress)
    classifier = head_parameters(head)
    model.requires_grad_(True)
    trained = _reached(encoder, album.train.batch(range(1)))
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return Tuning(
        task=ImageTask(encoder, head, used, album, spec.images.augment, Batching.of(spec)),
        blocks=model.get_submodule(row.module_blocks or row.blocks),
        trained=[model],
        weights=MasterWeights(
            trained | classifier,
            decayed=[WEIGHT, *(name for name in trained if row.is_linear(name))],
            rate_factors=dict.fromkeys(classifier, spec.head_factor),
        ),
        returned={},
        kernels=Report(backend_of(encoder.device), (Piece("all modules", 0, "as the library wrote them"),)),
    )


def _reached(encoder: Encoder, pixels: Floats) -> dict[str, nn.Parameter]:
    """The parameters that what the head reads depends on: not a mask token, nor a norm behind it."""
    encoder.features(pixels).sum().backward()  # type: ignore[no-untyped-call]
    reached = {name: parameter for name, parameter in encoder.body.named_parameters() if parameter.grad is not None}
    encoder.body.zero_grad(set_to_none=True)
    return reached


def _write_classifier(task: ImageTask, base: BaseModel, dtype: str, out: Path) -> None:
    """The encoder and its head as the classifier of transformers that a plug-in would be."""
    vision = task.encoder.vision
    tuned = {
        f"{vision.prefix}.{base.row.name_of(name) or name}": it for name, it in task.encoder.body.named_parameters()
    }
    made = [from_array(name, it.detach().float().cpu().numpy(), dtype) for name, it in tuned.items()]
    made += [from_array(name, it.detach().cpu().numpy(), "F32") for name, it in head_parameters(task.head).items()]
    with staged_folder(out) as folder:
        write_checkpoint(folder, made)
        write_stream(folder / CONFIG, [classifier_config(base, vision, task.album.classes)])
        write_stream(folder / PROCESSOR, [(base.folder / PROCESSOR).read_bytes()])


def _write(model: "PreTrainedModel", base: Base, out: Path) -> None:
    from transformers import GenerationConfig

    with staged_folder(out) as folder:
        with quiet():
            model.set_attn_implementation("eager")  # no name of ours goes into the config
            model.generation_config = GenerationConfig()  # of no use in scoring, and it would refuse to write odd ones
            model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (base.folder / name).is_file():
                write_stream(folder / name, [(base.folder / name).read_bytes()])
