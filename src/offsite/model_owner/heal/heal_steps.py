"""Healing: runs the healing steps of the settings in order; each starts from the result of the previous step."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offsite.config import PackSpec
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.heal.healing_protocol import Healing, emulator_step, places_step
from offsite.models.block_widths import Kept
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import TensorRange

# in the scratch folder; a file of this name tells `offsite.training` that there is a resume point
RECORD = "state.json"


def fill_places(middle: Sequence[int], kept: Sequence[int], spec: PackSpec) -> tuple[int, ...]:
    """The base indices of the emulator's blocks, in order.

    They are the kept blocks. With the healing step `share`, the emulator has as many blocks as the middle: in place of
    each dropped block runs the kept block with the closest index, so an index can occur several times.

    Args:
        middle: base indices of the middle's blocks, in order.
        kept: base indices of the selected blocks, in order.
        spec: the settings, which name the healing steps.
    """
    filling = [places_step(step) for step in spec.healing_steps if step.runs == "places"]
    return filling[0].fill_places(middle, kept) if filling else tuple(kept)


@dataclass(frozen=True)
class Healed:
    """The changed tensors of a healed emulator, and which heads, neurons and experts its narrowed blocks still have."""

    tensors: Mapping[str, TensorRange]  # by their name in the base; the values are in files of the scratch folder
    kept: Mapping[int, Kept]  # base index of each narrowed block -> its heads, neurons and experts that remain


def heal(healing: Healing) -> Healed:
    """Narrow, prune and heal the emulator as the settings say.

    Steps that an interrupted run completed are not repeated.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
        OffsiteError: the loss of a step diverged.
        KeyboardInterrupt: the user interrupted the run.
    """
    work = work_of(healing.sandwich.middle, healing.spec)
    healed = _solve(healing) if work.block_by_block else Healed({}, {})
    tensors = healed.tensors
    for step in work.later_steps:
        tensors = emulator_step(step).heal_emulator(healing, tensors)
    return Healed(tensors, healed.kept)


def _solve(healing: Healing) -> Healed:
    """Narrow, prune and heal block by block, from the block on where an earlier run was interrupted.

    If an earlier run completed this part, its result is read.
    """
    from offsite.model_owner.heal.block_by_block import block_by_block, read_solved

    model, emulator, folder = healing.model, healing.emulator, healing.scratch / "solved"
    whole = folder / "whole"  # exists when the folder holds every solved block
    record = healing.scratch / RECORD
    if whole.exists():
        solved = read_solved(model, emulator, folder)
        return Healed(solved.tensors, solved.kept)
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    statistics = None
    if healing.widths is not None and healing.spec.unit_rule.by_loss:
        from offsite.model_owner.narrow.loss_statistics import loss_statistics

        statistics = loss_statistics(model, emulator, healing.spec, healing.scratch, healing.progress)
    solved = block_by_block(
        model,
        healing.sandwich,
        emulator,
        healing.spec,
        folder,
        healing.progress,
        widths=healing.widths,
        statistics=statistics,
        record=record,
    )
    replace_file(whole, b"")
    return Healed(solved.tensors, solved.kept)
