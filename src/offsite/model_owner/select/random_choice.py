"""Random selection, the control that every other rule must beat."""

import random

from offsite.model_owner.select.selection import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """Blocks drawn without replacement by the seed of the settings, in order."""
    drawn = random.Random(selection.spec.seed)  # noqa: S311  no secret
    return tuple(sorted(drawn.sample(selection.middle, selection.keep)))
