"""Selection: chooses which of the base's middle blocks the emulator keeps, by the rule in the settings."""

import json
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.selection_protocol import Selection, selector
from offsite.progress import Progress
from offsite.storage.files import replace_file

_CHOSEN = "selected.json"  # in the scratch folder


def select_blocks(
    model: BaseModel, sandwich: Sandwich, spec: PackSpec, scratch: Path, progress: Progress
) -> tuple[int, ...]:
    """The base indices of the middle blocks that the emulator keeps, in ascending order.

    Args:
        model: the opened base.
        sandwich: the split of the base into bottom, middle and top.
        spec: the settings, with the selection rule and the number of kept blocks.
        scratch: a folder for the scores of a search, and for what a rule that runs the base's blocks chose; an
            interrupted run goes on with it.
        progress: receives the progress events.

    Raises:
        UsageError: a setting of the rule does not fit the model.
        DataError: the calibration data is unreadable or too short.
        StorageError: a file cannot be written.
    """
    selection = Selection(model, sandwich, spec, scratch, progress)
    if selection.keep == len(selection.middle):
        return sandwich.middle
    rule, chosen = spec.selection_rule, scratch / _CHOSEN
    if not rule.runs_blocks or rule.resumable:  # a rule that is quick, or that stores what it chose
        return selector(rule).select(selection)
    if chosen.exists():
        return tuple(json.loads(chosen.read_bytes()))
    blocks = selector(rule).select(selection)
    replace_file(chosen, json.dumps(blocks).encode())
    return blocks
