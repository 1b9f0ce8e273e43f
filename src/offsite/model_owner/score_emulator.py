"""Scores a new emulator beside its base: how far its loss is from the base's is what the model owner should know first.

What the data owner tunes is the emulator, so a return of an emulator that is far from its base may be of no use. Both
are scored on text that no step of packing was fitted on, if there is such text.
"""

import math
from collections.abc import Sequence

import numpy as np

from offsite.config import PackSpec
from offsite.data.examples import Example
from offsite.evaluation.intervals import paired_interval
from offsite.evaluation.row_losses import RowLoss, row_losses
from offsite.kernels.peak_memory import available_memory
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.calibration.scored_text import scored_text
from offsite.model_owner.check_packing import runs_network
from offsite.model_owner.emulator_score import EmulatorScore
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.partition import partition
from offsite.model_owner.resolve_defaults import resolve_defaults
from offsite.models.backbone import split_backbone_and_head
from offsite.models.loading import load_model
from offsite.models.model_folder import Source
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.progress import NOTE, Event, Progress, silent
from offsite.protocol.artifacts import Base, Bundle
from offsite.protocol.home import Home

SCORED_TOKENS = 2048  # enough to see a difference of a few hundredths, in a small part of the time of packing
_LENGTH = 256  # tokens of a sequence
_BUDGET = 2048  # tokens that run at once


def score_emulator(
    base: Base, bundle: Bundle, spec: PackSpec, home: Home, progress: Progress = silent
) -> EmulatorScore | None:
    """Score a bundle's untuned emulator and its base on the same text, and record the result in the ledger.

    The ledger stays with the owner: the losses would tell the data owner how much better the base is. Base and bundle
    are loaded one after the other, each whole, as `offsite eval` does.

    Args:
        base: the owner's full model.
        bundle: the bundle that was packed from it.
        spec: the settings of packing, which name the calibration text, device and dtype.
        home: the model owner's home folder, with its ledger.
        progress: receives the progress events.

    Returns:
        The score; None for an image encoder, which has no loss without a classifier, and for a base that does not fit
        into the memory that is free, which an event says.

    Raises:
        DataError: the calibration text cannot be read.
        IncompatibleError, StorageError: as for `offsite.evaluation.evaluate.evaluate`.
    """
    model = open_base(base)
    if model.family.vision is not None:
        return None
    tokenizer = load_tokenizer(base.folder)
    fits, distills = _uses_of_calibration(model, spec)
    text = scored_text(model, spec, tokenizer, fits=fits, distills=distills)
    length = min(_LENGTH, context_length(base.folder) or _LENGTH)
    examples = _sequences(tokenizer.bos_token_id, text.passages, length)
    runtime = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    if (needed := _bytes(model, runtime)) > (available := available_memory(runtime.device) or needed):
        progress(Event(f"{NOTE}base and emulator were not scored: {_room(needed, available)}", 0))
        return None
    before = _losses(base.folder, examples, runtime, progress, "scoring the base")
    after = _losses(bundle.files, examples, runtime, progress, "scoring the emulator")
    sizes = [float(row.tokens) for row in before]
    nats = [[row.nats for row in losses] for losses in (before, after)]
    ends = paired_interval(nats[1], nats[0], sizes)
    score = EmulatorScore(
        base_loss=sum(nats[0]) / sum(sizes),
        emulator_loss=sum(nats[1]) / sum(sizes),
        low=ends.low if ends else None,
        high=ends.high if ends else None,
        tokens=int(sum(sizes)),
        fitted=text.fitted,
        text=text.name,
    )
    Ledger(home.ledger).record_score(bundle.digest, score)
    return score


def _bytes(model: BaseModel, runtime: Runtime) -> int:
    """The memory for the base's weights in the compute dtype, in bytes."""
    return runtime.dtype.itemsize * sum(math.prod(tensor.shape) for tensor in model.tensors.values())


def _room(needed: int, available: int) -> str:
    """How much memory the base's weights need, and how much there is, in words."""
    return f"the base needs {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are free"


def _uses_of_calibration(model: BaseModel, spec: PackSpec) -> tuple[bool, bool]:
    """Whether packing with these settings ran the network on calibration text, and whether it distilled on it."""
    if model.family.layouts:  # a family that is read off the model; its blocks are known after a proof, which is long
        return True, True
    spec = resolve_defaults(model, spec)
    sandwich = partition(model, spec)
    return runs_network(sandwich, spec), bool(work_of(sandwich.middle, spec).later_steps)


def _sequences(bos: int | None, passages: Sequence[Sequence[int]], length: int) -> list[Example]:
    """Cut passages into sequences of at most `length` tokens; they have about SCORED_TOKENS tokens together.

    Args:
        bos: the token that begins every sequence; None: there is none.
        passages: token ids; the sequences are spread over them.
        length: the most tokens of a sequence.
    """
    start = [] if bos is None else [bos]
    body, found = length - len(start), []
    for ids in passages:
        found += [[*start, *ids[at : at + body]] for at in range(0, len(ids), body)]
    whole = [ids for ids in found if len(ids) > 1]
    count = max(1, SCORED_TOKENS // length)
    spread = [whole[at * len(whole) // count] for at in range(count)] if len(whole) > count else whole
    return [Example(number, np.array(ids, dtype=np.int64), 1, answers=False) for number, ids in enumerate(spread, 1)]


def _losses(
    model: Source, examples: Sequence[Example], runtime: Runtime, progress: Progress, stage: str
) -> list[RowLoss]:
    """The loss of one model on every sequence; the model is released when this returns."""
    network = split_backbone_and_head(load_model(model, dtype=runtime.dtype, device=runtime.device))
    return row_losses(network, examples, _BUDGET, progress, stage)
