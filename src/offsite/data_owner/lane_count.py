"""How many micro-batches of a tuning run side by side; their gradients are added in the order of the micro-batches."""

from typing import TYPE_CHECKING

import torch

from offsite.config import TuneSpec
from offsite.data_owner.text_task import TextTask
from offsite.kernels.cpu.side_by_side import independent
from offsite.kernels.cpu.thread_dropout import OwnRandomness
from offsite.kernels.memory_formulas import usual_lanes

if TYPE_CHECKING:
    from offsite.data_owner.train import Tuning
    from offsite.kernels.runtime import Runtime


def lane_count(tuning: "Tuning", spec: TuneSpec, where: "Runtime") -> int:
    """How many lanes a tuning has: what was asked for or is usual, and one where passes would get in each other's way.

    That is where they draw random numbers other than dropout's, whose order would be the threads', and where a long row
    changes the rotary embedding of all. With a head that trains each lane would hold a gradient as large as the head.
    Pictures gain nothing.
    """
    task = tuning.task
    if where.device.type != "cpu" or not isinstance(task, TextTask):
        return 1
    wanted = spec.memory.lanes or usual_lanes(torch.get_num_threads(), where.dtype.itemsize)
    if wanted == 1 or spec.adapter.tune_head:
        return 1
    return wanted if independent(task.network.body) and not _draws(tuning, task) else 1


@torch.no_grad()
def _draws(tuning: "Tuning", task: TextTask) -> bool:
    """Whether a pass in training draws random numbers of the process and not of its lane; they are given back."""
    for block in tuning.trained:
        block.train()
    before = torch.get_rng_state()
    with OwnRandomness(0):
        task.loss([min(range(task.rows), key=lambda row: len(task.examples[row].ids))], 0, 0)
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn
