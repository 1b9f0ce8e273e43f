"""Chooses the checkpoint and the strength of a plug-in by the loss on the model owner's held-out rows.

The base is loaded once. For each candidate, the tensors of its plug-in are copied into the network, rounded as they
would be stored. So a candidate's loss equals the loss that `evaluate` reports for the written plug-in.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from offsite.config import EvalSpec, PlugInSpec
from offsite.data.examples import Example
from offsite.data.read_rows import read_rows
from offsite.data.row import RowForm
from offsite.data.tokens import encode
from offsite.errors import PolicyError, UsageError
from offsite.evaluation.evaluate import load_tuned
from offsite.evaluation.row_losses import row_losses
from offsite.kernels.runtime import Runtime, resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.ledger import Issued
from offsite.model_owner.plugging_in.check_plug_in import form_of
from offsite.model_owner.plugging_in.plug_in import open_base_of, refusals_recorded
from offsite.model_owner.plugging_in.plug_in_contents import adapter_contents
from offsite.model_owner.plugging_in.plugged_tensors import Chosen, adapter_tensors, changed_tensors
from offsite.models.adapted import ADAPTED, saved_as
from offsite.models.backbone import Network, split_backbone_and_head
from offsite.models.families.architectures import Architecture
from offsite.models.loading import load_model
from offsite.models.mixture import in_files
from offsite.models.tokenizers import context_length, load_tokenizer
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Base, Return
from offsite.protocol.home import Home
from offsite.storage.safetensors_files import NewTensor, to_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALLEST, _LARGEST = 0.03, 1.5  # strengths that are tried at most if the best is at the edge of the grid
_REASONS = 5  # number of candidates that an error lists, the best first


@dataclass(frozen=True)
class Candidate:
    """A possible plug-in: a checkpoint of the return (from 1), a strength, and the loss in nats per labelled token."""

    checkpoint: int
    strength: float
    loss: float


@dataclass(frozen=True)
class Choice:
    """The result of `choose`: the best candidate, all candidates, and the base's loss in nats per labelled token."""

    best: Candidate
    base_loss: float
    candidates: tuple[Candidate, ...]  # by checkpoint, then by strength; without the base itself
    rows: int
    tokens: int  # number of labelled tokens
    # where the best strength is among those that were tried: smaller, or larger, ones might be better still
    edge: Literal["smallest", "largest"] | None = None


def choose(
    base: Base,
    returned: Return,
    data: Path,
    spec: PlugInSpec,
    measured: EvalSpec,
    home: Home,
    progress: Progress = silent,
) -> Choice:
    """Score every checkpoint of a return at every strength, and find the best.

    If the best strength is the smallest or the largest of the default ones, smaller or larger ones are tried too, for
    the best checkpoint. No plug-in is written. A return whose tensors are not finite at some strength is recorded in
    the ledger as refused.

    Args:
        base: the owner's full model.
        returned: the verified return, from `intake`.
        data: the file or folder of the owner's held-out rows, in a format that `offsite.data.read_rows` reads.
        spec: form, checkpoint and strength; a checkpoint or strength that is set is not varied.
        measured: sequence lengths, device and compute dtype, as for `evaluate`.
        home: the model owner's home folder, with its keys and its ledger.
        progress: receives the progress events.

    Raises:
        PolicyError: no candidate is better than the base and no strength was set; or as for `plug_in`.
        DataError: the data set is empty, or has bad or overlong rows.
        VerificationError, IncompatibleError, UsageError: as for `plug_in`.
    """
    model, parent = open_base_of(returned, base, spec, home, progress)
    if model.family.vision is not None:
        raise UsageError(
            "choosing is for language models",
            reasons=[f"the base is an image encoder ({model.family.model_type})"],
            next_step="plug in with --strength, and compare what `offsite eval` says of each",
        )
    if spec.explicit_keys & {"columns", "chosen"}:
        measured = measured.changed({"columns": spec.columns, "chosen": spec.chosen})
    examples = _read(base, data, measured)
    where = resolve_runtime(measured.runtime.device, measured.runtime.compute, measured.runtime.threads)
    grid = _grid(returned, spec)
    trial = _Trial(model, returned, parent, where, merged=form_of(returned, spec) == "merged")
    base_loss = _loss(trial.network, examples, measured.micro_batch_tokens)
    candidates: list[Candidate] = []

    def score(checkpoint: int, strength: float) -> None:
        facts: dict[str, float | str] = {"checkpoint": str(checkpoint), "strength": strength}
        total = max(len(grid), len(candidates) + 1)
        progress(Event("choosing", len(candidates), total, facts))
        with refusals_recorded(returned, home):
            trial.become(checkpoint, strength)
        loss = _loss(trial.network, examples, measured.micro_batch_tokens)
        candidates.append(Candidate(checkpoint, strength, loss))
        progress(Event("choosing", len(candidates), total, {**facts, "loss": loss}))

    for checkpoint, strength in grid:
        score(checkpoint, strength)
    if not spec.explicit_keys & {"strength", "strengths"}:
        while (further := _beyond(candidates)) is not None:
            score(_ranked(candidates)[0].checkpoint, further)
    ranked = _ranked(candidates)
    if spec.strength is None and not ranked[0].loss < base_loss:
        raise _none_is_better(ranked, base_loss, data)
    tokens = sum(example.labels for example in examples)
    inner = sorted(candidates, key=lambda one: (one.checkpoint, one.strength))
    edge = _edge(candidates) if spec.strength is None else None
    return Choice(ranked[0], base_loss, tuple(inner), len(examples), tokens, edge)


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates by their loss, the best first; those whose loss is not finite are last."""
    return sorted(candidates, key=lambda one: one.loss if math.isfinite(one.loss) else math.inf)


def _edge(candidates: Sequence[Candidate]) -> Literal["smallest", "largest"] | None:
    """Whether the best strength is the smallest or the largest of those tried; None if it is neither, or the only one.

    The largest strength that a plug-in may have is no edge, since nothing is beyond it.
    """
    tried, best = {one.strength for one in candidates}, _ranked(candidates)[0].strength
    if len(tried) == 1 or best == _LARGEST:
        return None
    return "smallest" if best == min(tried) else "largest" if best == max(tried) else None


def _beyond(candidates: Sequence[Candidate]) -> float | None:
    """The next strength to try, beyond the best one, if that is at an edge of those tried; None to stop.

    Below the smallest it is half of that; above the largest, it is as far away as the largest two are from each other.
    """
    edge, tried = _edge(candidates), sorted({one.strength for one in candidates})
    if edge == "smallest":
        return tried[0] / 2 if tried[0] / 2 >= _SMALLEST else None
    if edge == "largest":
        return min(_LARGEST, 2 * tried[-1] - tried[-2])
    return None


def _grid(verified: Return, spec: PlugInSpec) -> list[tuple[int, float]]:
    """The pairs of checkpoint and strength to score; strength 0, the base itself, is scored separately."""
    there = range(1, verified.manifest.checkpoints + 1)
    checkpoints = there if spec.checkpoint is None else [spec.checkpoint]
    tried = sorted({strength for strength in spec.strengths if strength > 0})
    strengths = tried if spec.strength is None else [spec.strength]
    return [(checkpoint, strength) for checkpoint in checkpoints for strength in strengths]


def _none_is_better(ranked: Sequence[Candidate], base_loss: float, data: Path) -> PolicyError:
    """The error that no candidate has a lower loss than the base; `ranked` are the candidates, best first."""
    return PolicyError(
        f"the base itself is best on {data}, so nothing was plugged in",
        reasons=[
            f"the base: loss {base_loss:.4f}",
            *(f"checkpoint {c.checkpoint} at strength {c.strength:g}: loss {c.loss:.4f}" for c in ranked[:_REASONS]),
        ],
        next_step="if these rows are the right ones, leave the return; to plug it in all the same, give --strength",
    )


def _read(base: Base, data: Path, spec: EvalSpec) -> Sequence[Example]:
    """Read and tokenise the held-out rows, at most as many and as long as the settings say."""
    longest = min(spec.max_length, context_length(base.folder) or spec.max_length)
    rows = read_rows(data, RowForm(spec.columns or {}, spec.chosen), "held out")[: spec.max_rows]
    tokenizer = load_tokenizer(base.folder)
    encoded = encode(rows, tokenizer, source=data, max_length=longest, long_rows=spec.long_rows)
    return encoded.examples[: spec.max_rows]


def _loss(network: Network, examples: Sequence[Example], budget: int) -> float:
    """The mean cross-entropy in nats per labelled token; `budget` is the number of tokens per micro-batch."""
    losses = row_losses(network, examples, budget)
    return sum(row.nats for row in losses) / sum(row.tokens for row in losses)


class _Trial:
    """The base's network, into which the tensors of one candidate plug-in after the other are copied.

    A return gives one candidate for each of its checkpoints and each strength. At first, the network computes the same
    as the base.

    Args:
        base: the opened base.
        verified: the verified return.
        parent: the ledger's record of the return's bundle.
        where: the device, and the compute dtype.
        merged: whether the plug-ins are merged checkpoints; if not, they are adapters.
    """

    def __init__(self, base: BaseModel, verified: Return, parent: Issued, where: Runtime, *, merged: bool) -> None:
        self._base, self._verified, self._parent, self._merged = base, verified, parent, merged
        if merged:
            model = load_model(base.folder, dtype=where.dtype, device=where.device)
        else:  # an adapter of strength 0 adds the modules whose tensors will change
            with tempfile.TemporaryDirectory() as folder:
                adapter_contents(base, self._chosen(1, 0.0)).write(Path(folder))
                model = load_tuned(base.folder, Path(folder), where)
        self._places = _by_names_in_files(base.family, model)
        self.network = split_backbone_and_head(model)

    @torch.no_grad()
    def become(self, checkpoint: int, strength: float) -> None:
        """Copy the tensors of one candidate into the network; every candidate overwrites the same tensors.

        `checkpoint` is the number of the return's checkpoint, from 1.
        """
        chosen = self._chosen(checkpoint, strength)
        new: Mapping[str, NewTensor]
        if self._merged:
            new = changed_tensors(self._base, chosen)
        else:
            new = {tensor.name: tensor for tensor in adapter_tensors(self._base, chosen)}
        for name, tensor in new.items():
            values = np.array(to_float32(b"".join(tensor.chunks()), tensor.dtype)).reshape(tensor.shape)
            self._places[name].copy_(torch.from_numpy(values))

    def _chosen(self, checkpoint: int, strength: float) -> Chosen:
        return Chosen(self._verified, self._parent, checkpoint, np.float32(strength))


def _by_names_in_files(family: Architecture, model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The network's parameters, keyed by their names in a plug-in's files.

    The base's parameters have the names of checkpoint files; parameters that PEFT added, those of PEFT's adapter files.
    """
    parameters = dict(model.named_parameters())
    tuned = {name: parameter for name, parameter in parameters.items() if ADAPTED.search(name)}
    own = {name: parameter for name, parameter in parameters.items() if name not in tuned}
    return {**in_files(family, own), **{f"base_model.model.{saved_as(name)}": tuned[name] for name in tuned}}
