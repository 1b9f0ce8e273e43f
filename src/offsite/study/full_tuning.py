"""Full fine-tuning: every weight of the base, embeddings, norms and head included. What no party of the protocol can
do, and what its plug-ins are compared with; the loop is the data owner's own.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from offsite.config import TuneSpec
from offsite.core.architectures import Architecture
from offsite.core.attention import use_short_attention
from offsite.core.data import Example, encode
from offsite.core.fused import fuse
from offsite.core.load import context_length, load_model, load_tokenizer, quiet
from offsite.core.loss import take_apart
from offsite.core.progress import Event, Progress, silent
from offsite.core.resume import RunState, run_folder
from offsite.core.row_files import data_digest
from offsite.core.rows import read_rows
from offsite.core.run_log import log_file
from offsite.core.runtime import runtime, seeded
from offsite.core.storage import require_free, staged_folder, write_stream
from offsite.core.weights import TrainedWeights
from offsite.data_owner.budget import within_memory
from offsite.data_owner.checkpoints import Checkpoints
from offsite.data_owner.recompute import keep_activations
from offsite.data_owner.schedule import step_count
from offsite.data_owner.task import TextTask
from offsite.data_owner.train import Tuning, train
from offsite.exchange.artifacts import Base
from offsite.exchange.contents import TOKENIZER_FILES
from offsite.model_owner.base_model import open_base

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
    row = open_base(base).row
    where = runtime(spec.device, spec.compute, spec.threads)
    examples, held_out = _read(base, data, spec), _read(base, eval_data, spec)
    with seeded(spec.seed, where.device):
        run = {**spec.model_dump(mode="json"), "base": str(base.folder.resolve()), "data": data_digest(data)}
        state = RunState(run_folder(out), {**run, "compute": str(where.dtype)}, resume=resume)
        progress(Event("loading the model", 0))
        model = load_model(base.folder, dtype=where.dtype, device=where.device)
        tuning = _prepare(model, row, examples, held_out)
        fitted = within_memory(tuning, spec, where, state.folder / "memory.json", progress)
        only_the_last = spec.model_copy(update={"checkpoints": 1, "report_scores": False})
        checkpoints = Checkpoints(state, only_the_last, step_count(spec, len(examples)))
        train(tuning, fitted, state, checkpoints, log_file(out), progress)
    keep_activations(tuning.blocks)  # which puts the blocks' own names back
    progress(Event("writing the tuned model", 0))
    _write(model, base, out)
    state.remove()
    return Base(out)


def _read(base: Base, data: Path | None, spec: TuneSpec) -> tuple[Example, ...]:
    if data is None:
        return ()
    longest = min(spec.max_length, context_length(base.folder) or spec.max_length)
    tokenizer = load_tokenizer(base.folder)
    return encode(read_rows(data), tokenizer, source=data, max_length=longest, long_rows=spec.long_rows).examples


def _prepare(
    model: "PreTrainedModel", row: Architecture, examples: tuple[Example, ...], held_out: tuple[Example, ...]
) -> Tuning:
    network = take_apart(model)
    fuse(model)
    use_short_attention(model)
    model.requires_grad_(True)
    trained = dict(model.named_parameters())  # a tied head is the embedding, and is there once
    matrices = {*(name for name, sizes in row.embeddings.items() if " " in sizes), row.head}  # and no norm among them
    return Tuning(
        task=TextTask(network, examples, held_out),
        blocks=model.get_submodule(row.blocks),
        trained=[model],  # dropout runs everywhere
        weights=TrainedWeights(trained),
        decayed=frozenset(name for name in trained if name in matrices or row.is_linear(name)),
        returned={},  # to nobody
    )


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
