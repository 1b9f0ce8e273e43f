"""Chooses how many heads and neurons each block of the emulator keeps, as `narrow_widths` says. Torch-free."""

import json
from collections.abc import Sequence
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.narrow.budget_widths import budget_widths
from offsite.model_owner.narrow.even_widths import base_widths, even_widths
from offsite.models.block_widths import Widths
from offsite.progress import Progress
from offsite.storage.files import replace_file

_CHOSEN = "widths.json"  # in the scratch folder, so that a resumed run goes on with the widths of its narrowed blocks


def choose_widths(
    model: BaseModel, emulator: Sequence[int], spec: PackSpec, scratch: Path, progress: Progress
) -> tuple[Widths, ...]:
    """The numbers of heads and neurons that remain in each of the emulator's blocks, in the order of `emulator`.

    With `narrow_widths` = budget, the base's blocks run on the calibration data, unless an interrupted run already
    chose the widths.

    Args:
        model: the opened base.
        emulator: base indices of the emulator's blocks.
        spec: the settings of narrowing and calibration.
        scratch: a folder where widths that were chosen by budget are stored.
        progress: receives the progress events.

    Raises:
        IncompatibleError: nothing can be removed from the family's blocks, the config does not say how many heads
            they have, or activations of the base are not finite.
        UsageError: blocks cannot get as narrow as the settings ask.
        DataError: the calibration text is unreadable or too short.
        StorageError: a file cannot be written.
    """
    even = even_widths(model, emulator, spec)  # raises the errors about the settings before the long work
    if not spec.shares_budget:
        return even
    chosen = scratch / _CHOSEN
    if chosen.exists():
        stored = json.loads(chosen.read_bytes())
        bases = [base_widths(model, index) for index in emulator]
        return tuple(base.narrowed(units, neurons) for base, (units, neurons) in zip(bases, stored, strict=True))
    from offsite.model_owner.narrow.removal_errors import removal_errors

    statistics = None
    if spec.unit_rule.by_loss:
        from offsite.model_owner.narrow.loss_statistics import loss_statistics

        statistics = loss_statistics(model, emulator, spec, scratch, progress)
    errors = removal_errors(model, emulator, spec, progress, statistics=statistics)
    widths = budget_widths(model, emulator, errors, spec)
    replace_file(chosen, json.dumps([(one.units, one.neurons) for one in widths]).encode())
    return widths
