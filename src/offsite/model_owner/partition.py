"""Splitting: divides a base into bottom, middle and top, and raises an error for settings that do not fit the base."""

from collections.abc import Collection, Sequence
from pathlib import Path

from offsite.config import PackSpec
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.compress.declare_emulator import require_declarable
from offsite.model_owner.emulator_work import Work, work_of
from offsite.model_owner.narrow.even_widths import require_narrower
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.select_blocks import select_blocks
from offsite.progress import silent


def partition(model: BaseModel, spec: PackSpec) -> Sandwich:
    """Split a base into bottom, middle and top, and check the settings against it.

    Raises:
        UsageError: the numbers of blocks in the settings do not fit the model; the settings permit tuning the head, and
            the model has no head of its own; or settings do not work together, or not for this kind of model.
        IncompatibleError: the family's blocks cannot be compressed, narrowed or run one by one as the settings need it.
    """
    verbatim = spec.verbatim(model.blocks)
    _require_room(model.blocks, verbatim, spec)
    sandwich = Sandwich.of(verbatim, model.blocks)
    middle = sandwich.middle
    work = work_of(middle, spec)
    _require_gap(middle, spec, work)
    if not model.family.runs_by_block:
        _require_no_runs(model, middle, spec, work)
    if spec.permits.permit_head and not model.family.head_tensors(model.config):
        raise UsageError(
            "--permit-head has no head to permit",
            reasons=[
                "its head is the input embedding, which trains with no adapter"
                if model.family.head
                else "an image encoder has none: its classifier is the data owner's"
            ],
            next_step="pack without --permit-head",
        )
    if sandwich.spread:
        _require_for_spread(spec)
    if model.family.vision is not None:
        _require_for_images(spec)
    if not spec.selection_rule.runs_blocks:  # raises an error if the rule's settings do not fit
        select_blocks(model, sandwich, spec, Path(), silent)
    require_declarable(model, spec)
    if spec.narrows:
        require_narrower(model, middle, spec)
    return sandwich


def _require_no_runs(model: BaseModel, middle: Sequence[int], spec: PackSpec, work: Work) -> None:
    """Raise an error if settings need to run single blocks; called only for a model whose single blocks cannot be run.

    Args:
        model: the opened base, whose family has `runs_by_block` false.
        middle: base indices of the middle's blocks.
        spec: the settings.
        work: the healing and pruning that the settings require.

    Raises:
        IncompatibleError: healing, a calibrated pruner or the selection rule would run single blocks.
    """
    reasons = [f"heal = {', '.join(step.name for step in work.steps)}"] if work.steps else []
    reasons += [f"prune_by = {work.pruner.name}"] if work.pruner is not None else []
    if spec.selection_rule.runs_blocks and spec.kept(middle) < len(middle):
        reasons.append(f"select = {spec.selection_rule.name}")
    if reasons:
        raise IncompatibleError(
            f"the blocks of this {model.family.model_type} model cannot be run one by one",
            reasons=[f"{reason}, which runs them so" for reason in reasons],
            next_step=f"{_without_healing(spec)}, and with --keep or --prune-by magnitude",
        )


def _without_healing(spec: PackSpec) -> str:
    return f"pack with --heal none{'' if spec.distill.minutes is None else ', without --heal-minutes'}"


def _require_room(blocks: int, trained: Collection[int], spec: PackSpec) -> None:
    """Raise an error if the numbers of blocks in the settings do not fit the base.

    Args:
        blocks: the base's number of blocks.
        trained: base indices of the trained blocks.
        spec: the settings, with the number of blocks that the emulator keeps.

    Raises:
        UsageError: the middle is empty or has fewer blocks than the emulator is to keep, nothing would train, or
            `trained` lists blocks that the base does not have.
    """
    beyond = sorted(index for index in trained if index >= blocks)
    if beyond:
        raise UsageError(
            f"train names blocks that the base does not have: {', '.join(map(str, beyond))[:200]}",
            reasons=[f"it has {blocks}, numbered from 0"],
            next_step=f"choose among 0 to {blocks - 1}",
        )
    middle = [index for index in range(blocks) if index not in trained]
    if not trained and not spec.adapts_emulator:
        raise UsageError(
            "nothing would train: the emulator keeps every block",
            reasons=[f"the base has {blocks} {'block' if blocks == 1 else 'blocks'}"],
            next_step="choose a base of at least two blocks" if blocks == 1 else f"choose --keep below {blocks}",
        )
    if not 1 <= spec.kept(middle) <= len(middle):
        raise UsageError(
            f"cannot keep {spec.kept(middle) or 'any'} blocks of a middle of {len(middle)}",
            reasons=[f"the base has {blocks} blocks, of which {len(trained)} train"],
            next_step=f"choose --keep between 1 and {len(middle)}"
            if middle
            else "choose a smaller --bottom or --top, or a shorter --train",
        )


def _require_gap(middle: Sequence[int], spec: PackSpec, work: Work) -> None:
    """Raise an error if the user asked for a healing step that would do nothing, since nothing it heals is lost.

    Args:
        middle: base indices of the middle's blocks.
        spec: the settings.
        work: the healing and pruning that the settings require.

    Raises:
        UsageError: a healing step would do nothing.
    """
    idle = [step.name for step in spec.healing_steps if step not in work.steps]
    if idle and "heal" in spec.explicit_keys:
        raise UsageError(
            f"--heal {','.join(idle)} would do nothing",
            reasons=[
                "no block is dropped or narrowed, and no matrix pruned on calibration data; other losses are not healed"
            ],
            next_step=f"say with --keep how many blocks stay, or {_without_healing(spec)}",
        )


def _require_for_spread(spec: PackSpec) -> None:
    """Raise an error if a setting needs consecutive frozen blocks.

    It is called only for a split with trained blocks between frozen ones.

    Raises:
        UsageError: such a setting is in use.
    """
    reasons = spec.not_for_spread()
    if reasons:
        raise UsageError(
            "settings that go with no trained blocks between frozen ones",
            reasons=reasons,
            next_step=spec.nearest(lambda row: row.for_spread, left_out=spec.declaring_settings)
            + "; or let train list first and last blocks alone",
        )


def _require_for_images(spec: PackSpec) -> None:
    """Raise an error if a setting works only for language models; called only if the base is an image encoder.

    Raises:
        UsageError: such a setting is in use.
    """
    reasons = spec.not_for_images()
    if reasons:
        raise UsageError(
            "settings that are for language models alone, of an image encoder",
            reasons=reasons,
            next_step=spec.nearest(lambda row: row.for_images, left_out=_only_for_texts(spec)),
        )


def _only_for_texts(spec: PackSpec) -> list[str]:
    """The names of the settings in use that work only for language models: stored forms, and some others."""
    bottlenecks = set(spec.permits.methods) == {"bottleneck"}
    others = [*(["distill_ce"] if spec.distill.ce else []), *(["methods"] if bottlenecks else [])]
    return [*spec.declaring_settings, *others]
