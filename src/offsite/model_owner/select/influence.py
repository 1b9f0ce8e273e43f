"""Selection by block influence (ShortGPT, arXiv 2403.03853): how much a block changes the hidden state's direction."""

from collections.abc import Mapping

import torch

from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.select.selection_protocol import Selection
from offsite.progress import Event


def select(selection: Selection) -> tuple[int, ...]:
    """The base indices of the kept blocks: those of the middle with the highest influence.

    Raises:
        DataError: the calibration data is unreadable or too short.
    """
    return most_influential(block_influence(selection), selection.keep)


def most_influential(scores: Mapping[int, float], keep: int) -> tuple[int, ...]:
    """The indices of the blocks with the `keep` highest scores, in ascending order; of equal scores, the earlier block.

    `scores` has the score of each block, keyed by the block's base index.
    """
    ranked = sorted(scores, key=lambda index: (-scores[index], index))
    return tuple(sorted(ranked[:keep]))


def block_influence(selection: Selection) -> dict[int, float]:
    """The influence of each block of the middle, keyed by base index.

    It is 1 - E[cos(x, y)] over calibration tokens, for the block's input x and output y. The cosine depends on
    directions only, so tokens with very large activations count no more than others.
    """
    model, spec, middle = selection.model, selection.spec, selection.middle
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    runner = BlockRunner(model, machine)
    batches = [
        ids.to(machine.device)
        for ids in calibration_batches(model, spec.calibration.source, spec.calibration.tokens, row_form(spec))
    ]
    first = runner.load(0)
    hidden = [first.embed(ids) for ids in batches]
    scores: dict[int, float] = {}
    for index in range(middle[-1] + 1):
        selection.progress(Event("measuring block influence", index, middle[-1] + 1))
        block = runner.load(index)
        cosines = []
        for position, ids in enumerate(batches):
            after = block(ids, hidden[position])
            cosines.append(torch.cosine_similarity(hidden[position], after, dim=-1).flatten())
            hidden[position] = after
        scores[index] = 1 - float(torch.cat(cosines).mean())
    return {index: scores[index] for index in middle}
