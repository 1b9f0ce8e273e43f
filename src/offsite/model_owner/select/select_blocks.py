"""Selection: which blocks of the middle the emulator keeps."""

import random
from pathlib import Path

from offsite.config import PackSpec
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.select.contiguous import contiguous
from offsite.model_owner.select.uniform import uniform
from offsite.progress import Progress


def select(model: BaseModel, sandwich: Sandwich, spec: PackSpec, scratch: Path, progress: Progress) -> tuple[int, ...]:
    """The base indices of the kept blocks, in order; `scratch` is where a search remembers what it tried."""
    middle, keep = sandwich.middle, spec.kept(sandwich.middle)
    if keep == len(middle):
        return middle
    if spec.select == "uniform":
        return uniform(middle, keep)
    if spec.select == "random":
        return tuple(sorted(random.Random(spec.seed).sample(middle, keep)))  # noqa: S311  no secret
    if spec.select == "contiguous":
        return contiguous(middle, keep, spec.drop_from)
    if spec.select == "cluster":
        from offsite.model_owner.select.cluster import cluster

        return cluster(model, middle, spec, progress)
    if spec.select == "search":
        from offsite.model_owner.select.search import search

        return search(model, sandwich, spec, scratch, progress)
    from offsite.model_owner.select.influence import block_influence

    return most_influential(block_influence(model, middle, spec, progress), keep)


def most_influential(scores: dict[int, float], keep: int) -> tuple[int, ...]:
    """The blocks that change the hidden state's direction most; of equals the earlier."""
    ranked = sorted(scores, key=lambda index: (-scores[index], index))
    return tuple(sorted(ranked[:keep]))
