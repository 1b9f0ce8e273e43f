"""Healing: runs the healing steps of the settings in order; each starts from the result of the step before."""

import shutil
from collections.abc import Mapping, Sequence

from offsite.config import PackSpec
from offsite.model_owner.emulator_work import work_of
from offsite.model_owner.heal.healing_protocol import Healing, emulator_step, places_step
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import TensorRange, read_header


def fill_places(middle: Sequence[int], kept: Sequence[int], spec: PackSpec) -> tuple[int, ...]:
    """The base indices of the emulator's blocks, in order.

    These are the kept blocks; with a step such as sharing, an emulator as long as the middle in which kept blocks
    repeat.

    Args:
        middle: base indices of the middle, in order.
        kept: base indices of the selected blocks, in order.
        spec: the settings, which name the healing steps.
    """
    filling = [places_step(step) for step in spec.healing_steps if step.runs == "places"]
    return filling[0].fill_places(middle, kept) if filling else tuple(kept)


def heal(healing: Healing) -> Mapping[str, TensorRange]:
    """Heal the emulator, and return the tensors that changed.

    Keys are tensor names in the base; the tensors are in files of `scratch`. Results that an interrupted run completed
    are reused.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
        OffsiteError: the loss of a step diverged.
        KeyboardInterrupt: the user interrupted the run.
    """
    work = work_of(healing.sandwich.middle, healing.spec)
    healed = _solve(healing) if work.block_by_block else {}
    for step in work.later_steps:
        healed = emulator_step(step).heal_emulator(healing, healed)
    return healed


def _solve(healing: Healing) -> Mapping[str, TensorRange]:
    """Run the block-by-block part of healing and pruning, or read its result if an earlier run completed it."""
    folder, family = healing.scratch / "solved", healing.model.family
    whole = folder / "whole"  # exists when the folder holds every solved block
    if whole.exists():
        files = {index: read_header(folder / f"{index}.safetensors") for index in healing.emulator}
        return {family.in_block(index, path): tensor for index, held in files.items() for path, tensor in held.items()}
    from offsite.model_owner.heal.block_by_block import block_by_block

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    solved = block_by_block(healing.model, healing.sandwich, healing.emulator, healing.spec, folder, healing.progress)
    replace_file(whole, b"")
    return solved
