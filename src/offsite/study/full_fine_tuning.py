"""Full fine-tuning: every weight of the base trains, embeddings, norms and head included.

No party of the protocol can do this; plug-ins are compared with it. It trains by the same loop as a tuning. An encoder
becomes an image classifier with a head for the classes of the pictures, as a plug-in does.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offsite.config import TuneSpec
from offsite.data.data_files import Part, data_digest
from offsite.data.examples import Example
from offsite.data.pictures.picture_workers import PictureWorkers
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.data.tokens import encode
from offsite.data_owner.image_task import ImageTask, head_parameters
from offsite.data_owner.memory_budget import within_memory
from offsite.data_owner.train import train
from offsite.data_owner.tuning_pictures import open_album
from offsite.kernels import keep_activations
from offsite.kernels.runtime import resolve_runtime, seeded, worker_count
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.plugging_in.image_classifier import classifier_config
from offsite.models.hugging_face_calls import quiet
from offsite.models.loading import load_model
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base
from offsite.protocol.contents import CONFIG, PROCESSOR, TOKENIZER_FILES
from offsite.protocol.output_place import require_place
from offsite.storage.checkpoint_folder import write_checkpoint
from offsite.storage.files import staged_folder, write_stream
from offsite.storage.safetensors_files import from_array
from offsite.study.all_weights_tuning import all_weights_on_pictures, all_weights_on_text
from offsite.training.resume_points import RunState
from offsite.training.run_log import log_file, run_folder

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
    """Train all weights of a base model on a data set, and write the tuned model.

    Args:
        base: the model; it is only read.
        data: a data set of rows, or of pictures for an encoder, to train on.
        out: the tuned checkpoint's folder, in the compute dtype; it appears complete or not at all.
        spec: how to train; settings of the adapter are ignored.
        eval_data: a data set to validate on; None: no validation.
        resume: continue an interrupted run, or start one if there is none.
        progress: called with the progress events.

    Raises:
        UsageError: `out` is not empty, or a run with other settings was interrupted there.
        DataError: rows are wrong, too long, or missing.
        IncompatibleError: the base does not load.
        OffsiteError: the training diverged.
        StorageError: something cannot be read or written.
        KeyboardInterrupt: the user stopped it; a resume point was saved.
    """
    require_place(out, base.folder, data, eval_data)
    base_model = open_base(base)
    family = base_model.family
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    with PictureWorkers(worker_count(spec.images.workers, runtime.device)) as workers:
        is_encoder = family.vision is not None
        album = open_album(base.folder, data, eval_data, spec, progress, workers) if is_encoder else None
        examples, held_out = (
            ((), ()) if album else (_read(base, data, spec, "train"), _read(base, eval_data, spec, "held out"))
        )
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
                tuning = all_weights_on_text(model, family, examples, held_out, spec)
            else:
                tuning = all_weights_on_pictures(model, family, album, spec, progress)
            progress(Event(tuning.kernels.in_words(), 0))
            one_lane = spec.changed({"lanes": 1})  # every lane would hold a gradient of the entire model
            fitted = within_memory(tuning, one_lane, runtime, state.folder / "memory.json", progress)
            tuning = replace(tuning, kernels=tuning.kernels.with_pieces(*fitted.pieces))
            train(tuning, fitted.spec, state, log_file(out), progress)
    keep_activations(tuning.blocks)  # so that parameters have the names of the library's model again
    progress(Event("writing the tuned model", 0))
    if isinstance(tuning.task, ImageTask):
        _write_classifier(tuning.task, base_model, "BF16" if runtime.dtype == torch.bfloat16 else "F32", out)
    else:
        _write_language_model(model, base, out)
    state.remove()
    return Base(out)


def _read(base: Base, data: Path | None, spec: TuneSpec, part: Part) -> tuple[Example, ...]:
    """Read and tokenise the rows of a data set; () if `data` is None."""
    if data is None:
        return ()
    longest = min(spec.rows.max_length, context_length(base.folder) or spec.rows.max_length)
    tokenizer = load_tokenizer(base.folder)
    rows = read_rows(data, RowForm(spec.rows.columns or {}, spec.rows.chosen), part)
    return encode(rows, tokenizer, source=data, max_length=longest, long_rows=spec.rows.long_rows).examples


def _write_classifier(task: ImageTask, base: BaseModel, dtype: str, out: Path) -> None:
    """Write the encoder and its head as an image classifier of transformers, as a plug-in is written."""
    vision = task.encoder.vision
    tuned = {
        f"{vision.prefix}.{base.family.name_of(name) or name}": it for name, it in task.encoder.body.named_parameters()
    }
    tensors = [from_array(name, it.detach().float().cpu().numpy(), dtype) for name, it in tuned.items()]
    tensors += [from_array(name, it.detach().cpu().numpy(), "F32") for name, it in head_parameters(task.head).items()]
    with staged_folder(out) as folder:
        write_checkpoint(folder, tensors)
        write_stream(folder / CONFIG, [classifier_config(base, vision, task.album.classes)])
        write_stream(folder / PROCESSOR, [(base.folder / PROCESSOR).read_bytes()])


def _write_language_model(model: "PreTrainedModel", base: Base, out: Path) -> None:
    """Write a tuned language model, with the tokenizer of its base, as a checkpoint folder."""
    from transformers import GenerationConfig

    with staged_folder(out) as folder:
        with quiet():
            model.set_attn_implementation("eager")  # so that the config does not name an attention of ours
            model.generation_config = (
                GenerationConfig()
            )  # scoring needs no generation config, and transformers refuses to write unusual ones
            model.save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (base.folder / name).is_file():
                write_stream(folder / name, [(base.folder / name).read_bytes()])
