"""Block influence (ShortGPT, arXiv 2403.03853): how far a block turns the hidden state."""

from collections.abc import Sequence

import torch

from offsite.config import PackSpec
from offsite.kernels.runtime import runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner
from offsite.model_owner.calibration import calibration_batches
from offsite.progress import Event, Progress


def block_influence(model: BaseModel, middle: Sequence[int], spec: PackSpec, progress: Progress) -> dict[int, float]:
    """BI of each block of the middle: 1 - E[cos(hidden before, hidden after)] over calibration tokens.

    The cosine looks at directions alone, so tokens with massive activations weigh no more than others.
    """
    machine = runtime(spec.device, spec.compute, spec.threads)
    runner = BlockRunner(model, machine)
    batches = [ids.to(machine.device) for ids in calibration_batches(model, spec.calibration, spec.calibration_tokens)]
    first = runner.load(0)
    hidden = [first.embed(ids) for ids in batches]
    scores: dict[int, float] = {}
    for index in range(middle[-1] + 1):
        progress(Event("measuring block influence", index, middle[-1] + 1))
        block = runner.load(index)
        cosines = []
        for position, ids in enumerate(batches):
            after = block(ids, hidden[position])
            cosines.append(torch.cosine_similarity(hidden[position], after, dim=-1).flatten())
            hidden[position] = after
        scores[index] = 1 - float(torch.cat(cosines).mean())
    return {index: scores[index] for index in middle}
