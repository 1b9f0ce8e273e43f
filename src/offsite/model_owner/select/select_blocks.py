"""Selection: chooses which of the base's middle blocks the emulator keeps, by the rule in the settings."""

from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.selection_protocol import Selection, selector
from offsite.progress import Progress


def select_blocks(
    model: BaseModel, sandwich: Sandwich, spec: PackSpec, scratch: Path, progress: Progress
) -> tuple[int, ...]:
    """The base indices of the middle blocks that the emulator keeps, in ascending order.

    Args:
        model: the opened base.
        sandwich: the split of the base into bottom, middle and top.
        spec: the settings, with the selection rule and the number of kept blocks.
        scratch: a folder where a search stores its scores.
        progress: receives the progress events.

    Raises:
        UsageError: a setting of the rule does not fit the model.
        DataError: the calibration data is unreadable or too short.
        StorageError: a file cannot be written.
    """
    selection = Selection(model, sandwich, spec, scratch, progress)
    if selection.keep == len(selection.middle):
        return sandwich.middle
    return selector(spec.selection_rule).select(selection)
