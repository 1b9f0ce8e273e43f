"""Healing: the steps that make up for dropped blocks, one after the other, each from where the last one ended."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.work import work_of
from offsite.progress import Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import TensorRange, read_header


def heal(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    spec: PackSpec,
    scratch: Path,
    log: Path,
    progress: Progress,
) -> Mapping[str, TensorRange]:
    """The tensors of the emulator that healing changed, by base name, as they lie in files of `scratch`.

    What an interrupted run has finished is taken from there.

    Raises:
        DataError: the calibration text is unreadable or too short.
        StorageError: something cannot be written.
        OffsiteError: the distillation diverged.
        KeyboardInterrupt: the user stopped it.
    """
    work = work_of(sandwich.middle, spec)
    healed: Mapping[str, TensorRange] = {}
    if work.block_by_block:
        healed = _solved(model, sandwich, emulator, spec, scratch / "solved", progress)
    if work.distills:
        from offsite.model_owner.heal.distill import distill

        healed = distill(model, sandwich, emulator, healed, spec, scratch, log, progress)
    return healed


def _solved(
    model: BaseModel, sandwich: Sandwich, emulator: Sequence[int], spec: PackSpec, folder: Path, progress: Progress
) -> Mapping[str, TensorRange]:
    whole = folder / "whole"  # says that the folder holds every solved block
    if whole.exists():
        files = {index: read_header(folder / f"{index}.safetensors") for index in emulator}
        return {
            model.row.in_block(index, path): tensor for index, held in files.items() for path, tensor in held.items()
        }
    from offsite.model_owner.heal.block_by_block import block_by_block

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    solved = block_by_block(model, sandwich, emulator, spec, folder, progress)
    replace_file(whole, b"")
    return solved
