"""Selection: which blocks of the middle the emulator keeps."""

import random
from collections.abc import Sequence

from offsite.config import PackSpec
from offsite.core.progress import Progress
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.split import Sandwich


def select(model: BaseModel, sandwich: Sandwich, spec: PackSpec, progress: Progress) -> tuple[int, ...]:
    """The base indices of the kept blocks, in order."""
    if spec.keep == len(sandwich.middle):
        return sandwich.middle
    if spec.select == "uniform":
        return uniform(sandwich.middle, spec.keep)
    if spec.select == "random":
        return tuple(sorted(random.Random(spec.seed).sample(sandwich.middle, spec.keep)))  # noqa: S311  no secret
    from offsite.model_owner.compress.influence import block_influence

    scores = block_influence(model, sandwich.middle, spec, progress)
    return most_influential(scores, spec.keep)


def uniform(middle: Sequence[int], keep: int) -> tuple[int, ...]:
    """Evenly spread blocks, the first and the last among them (paper, section 3.3); keep = 1 takes the first."""
    if keep == 1:
        return (middle[0],)
    return tuple(middle[round(i * (len(middle) - 1) / (keep - 1))] for i in range(keep))


def most_influential(scores: dict[int, float], keep: int) -> tuple[int, ...]:
    """The blocks that change the hidden state's direction most; of equals the earlier."""
    ranked = sorted(scores, key=lambda index: (-scores[index], index))
    return tuple(sorted(ranked[:keep]))
