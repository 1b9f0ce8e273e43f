"""Random selection: a baseline for the other rules."""

import random

from offsite.model_owner.select.selection_protocol import Selection


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks, drawn without replacement with the seed in the settings."""
    drawn = random.Random(selection.spec.seed)  # noqa: S311  no secret
    return tuple(sorted(drawn.sample(selection.middle, selection.keep)))
