"""Random selection: the baseline that every other rule must beat."""

import random

from offsite.model_owner.select.selection_protocol import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks: drawn without replacement, by the seed in the settings."""
    drawn = random.Random(selection.spec.seed)  # noqa: S311  no secret
    return tuple(sorted(drawn.sample(selection.middle, selection.keep)))
