"""Audits a bundle for traps: weights that would write into the return which words stood in the private rows."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offsite.data_owner.audit_traps.activity import (
    Activity,
    distinct_tokens,
    measure_activity,
    measure_vocabulary,
    noise_pictures,
    token_sample,
)
from offsite.data_owner.audit_traps.activity_rules import activity_findings, selective_findings
from offsite.data_owner.audit_traps.block_layers import Matrix, matrices_of, vectors_of
from offsite.data_owner.audit_traps.findings import Finding, TrapAudit
from offsite.data_owner.audit_traps.weight_rules import (
    MatrixFigures,
    embedding_findings,
    figures_of,
    matrix_findings,
    vector_findings,
)
from offsite.data_owner.sent_bundle import as_sent
from offsite.models.families.family import Architecture
from offsite.models.loading import load_model
from offsite.progress import Event, Progress, silent
from offsite.protocol.artifacts import Bundle
from offsite.protocol.manifest import BundleManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 1024
_TOKENS_QUICK = 512
_PICTURES = 32
_BLOCKS_QUICK = 3  # how many of the first trained blocks the quick part runs
_DISTINCT = 16_384  # most tokens whose answers by the rows of block 0 are compared
_AT_ONCE = 64  # sequences of 64 tokens


def audit_traps(
    bundle: Bundle, *, quick: bool = False, seed: int | None = None, progress: Progress = silent
) -> TrapAudit:
    """Search a verified bundle for traps. Nothing is trained, and no private row is read.

    Args:
        bundle: the verified bundle.
        quick: whether only the part that `tune` runs by itself is run.
        seed: of the choice of tokens; None: a new one, which the sender cannot know.
        progress: receives the progress events.

    Returns:
        The findings. None is proof of a trap, and no finding is no proof that there is none.

    Raises:
        IncompatibleError: the bundle does not load.
        StorageError: its weights cannot be read.
    """
    progress(Event("loading the model", 0))
    with as_sent():
        model = load_model(bundle.files, dtype=torch.float32, device=torch.device("cpu"))
    return audit_model(model, bundle.manifest, quick=quick, seed=seed, progress=progress)


@torch.no_grad()
def audit_model(
    model: "PreTrainedModel",
    manifest: BundleManifest,
    *,
    quick: bool = False,
    seed: int | None = None,
    progress: Progress = silent,
) -> TrapAudit:
    """Search a bundle's loaded model for traps, see `audit_traps`; the model must not have adapters yet.

    Args:
        model: the model, in eval mode.
        manifest: the bundle's manifest.
        quick: whether only a part is run.
        seed: of the choice of tokens; None: a new one.
        progress: receives the progress events.
    """
    started = time.monotonic()
    seed = secrets.randbits(32) if seed is None else seed
    family, trained = manifest.family, manifest.split.trained
    blocks: Any = model.get_submodule(family.module_blocks or family.blocks)
    progress(Event("auditing the weights", 0, len(blocks)))
    findings, matrices = _audit_weights(blocks, family, trained, quick, progress)
    if family.vision is None:
        findings += embedding_findings(model.get_input_embeddings().weight.detach())
    inputs = 0
    if not any(one.rule == "not finite" for one in findings):
        progress(Event("auditing the activity", 0))
        found, inputs = _audit_activity(model, family, trained, quick, torch.Generator().manual_seed(seed))
        findings += found
    seconds = round(time.monotonic() - started, 3)
    return TrapAudit(tuple(findings), trained, matrices, inputs, quick, seed, seconds)


def _audit_weights(
    blocks: Any, family: Architecture, trained: tuple[int, ...], quick: bool, progress: Progress
) -> tuple[list[Finding], int]:
    """Run the rules on weights; returns the findings, and the number of matrices that were read."""
    figures: dict[str, dict[int, MatrixFigures]] = defaultdict(dict)
    vectors: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for place in range(len(blocks)):
        matrices: list[Matrix] = matrices_of(blocks[place], family)
        for matrix in matrices:
            figures[matrix.path][place] = figures_of(matrix.weight(), quick=quick)
        for path, values in vectors_of(blocks[place]):
            vectors[path][place] = values
        progress(Event("auditing the weights", place + 1, len(blocks)))
    found: list[Finding] = []
    found += _judge(figures, trained, matrix_findings)
    found += _judge(vectors, trained, vector_findings)
    return found, sum(map(len, figures.values()))


def _judge(
    figures: Mapping[str, Mapping[int, Any]], trained: tuple[int, ...], rule: Callable[..., Any]
) -> list[Finding]:
    """Apply a rule to each trained block's figures, with those of the same path in all other blocks."""
    return [
        one
        for path, by_block in figures.items()
        for place in trained
        if place in by_block
        for one in rule(
            f"block {place}, {path}", by_block[place], [other for at, other in by_block.items() if at != place]
        )
    ]


def _audit_activity(
    model: "PreTrainedModel", family: Architecture, trained: tuple[int, ...], quick: bool, generator: torch.Generator
) -> tuple[list[Finding], int]:
    """Run the rules on activity; returns the findings, and the number of tokens or pictures that were run."""
    places = trained[:_BLOCKS_QUICK] if quick else trained
    if family.vision is not None:
        given = noise_pictures(model, _PICTURES, generator)
    else:
        given = token_sample(model, _TOKENS_QUICK if quick else _TOKENS, generator)
    measured = measure_activity(model, family, places, given)
    found: list[Finding] = []
    for place, activity in measured.items():
        others: list[Activity] = [other for at, other in measured.items() if at != place]
        found += activity_findings(place, activity, others, _output_layers(family, place))
    count = len(given) if given.dim() == 4 else given.numel()
    if quick or family.vision is not None or places[0] != 0:
        return found, count
    rows = measured[0].rows
    for part in distinct_tokens(model, generator, _DISTINCT, _AT_ONCE):
        measure_vocabulary(model, family, 0, rows, part)
        count += part.numel()
    for path, selectivity in rows.items():
        if path not in _output_layers(family, 0):  # what a block writes to the residual stream has heavy tails
            found += selective_findings(f"block 0, {path}", selectivity)
    return found, count


def _output_layers(family: Architecture, place: int) -> tuple[str, ...]:
    """The paths in the torch module of the last linear layers of attention and MLP of a block."""
    start = f"{family.block_module(place)}."
    paths = [*family.outputs_of(place), *(family.experts.others if family.experts is not None else ())]
    return tuple(family.module_of(family.in_block(place, path)).removeprefix(start) for path in paths)
