"""Healing and pruning in closed form: one pass over the base, each kept block changed when its turn comes.

A block is changed on what the emulator's blocks before it give, and toward what the base gives before the next kept
block, so errors do not add up. At any time one block's weights are in memory.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from offsite.config import PackSpec
from offsite.errors import IncompatibleError
from offsite.kernels.runtime import runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock
from offsite.model_owner.calibration import calibration_batches
from offsite.model_owner.compress.sparsegpt import prune_maps
from offsite.model_owner.heal.affine import affine_map
from offsite.model_owner.heal.refit import refit
from offsite.model_owner.partition import DTYPES
from offsite.model_owner.sandwich import Sandwich
from offsite.model_owner.work import Work, work_of
from offsite.models.loading import read_tensor
from offsite.progress import Event, Progress
from offsite.storage.safetensors_files import TensorRange, from_array, read_header, write_safetensors

_Unsolvable: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it


def block_by_block(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    spec: PackSpec,
    scratch: Path,
    progress: Progress,
    *,
    batches: Sequence[Tensor] | None = None,
) -> Mapping[str, TensorRange]:
    """Solve what heals each kept block, and prune all maps on the way if SparseGPT is to.

    Args:
        model: the base; its blocks are loaded one at a time.
        sandwich: how it is cut.
        emulator: base indices of the kept blocks of the middle.
        spec: calibration text, tokens, and the dtype that the bundle will have.
        scratch: a folder for the solved weights until the bundle is written.
        progress: where the events go.
        batches: token ids (B, T) to fit on, in place of the calibration text of `spec`.

    Returns:
        The changed tensors, and those of maps behind blocks, by base name, as they lie in files of `scratch`.

    Raises:
        DataError: the calibration text is unreadable or too short.
        IncompatibleError: what goes through the base is no number, so nothing can be solved.
    """
    row = model.row
    machine = runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    runner = BlockRunner(model, machine)
    if batches is None:
        batches = calibration_batches(model, spec.calibration.source, spec.calibration.tokens)
    batches = [ids.to(machine.device) for ids in batches]
    work = work_of(sandwich.middle, spec)
    stage, end = _stage(work), sandwich.middle[-1] + 1
    base = [runner.load(0).embed(ids) for ids in batches]
    for index in sandwich.bottom:
        _advance(runner.load(index), batches, base)
    student = list(base)  # the emulator's hidden state, from here on its own
    done = len(sandwich.bottom)
    healed: dict[str, TensorRange] = {}
    for kept, following in pairwise((*sorted((*emulator, *sandwich.spread)), end)):
        while done < following:
            progress(Event(stage, done, end))
            _advance(runner.load(done), batches, base)
            done += 1
        if kept in sandwich.spread:  # trains, so both go through it as it is
            _advance(runner.load(kept), batches, student)
            continue
        with _solvable(kept):
            if work.maps:
                solved = affine_map(runner.load(kept), batches, student, base)
            else:
                pruned: Mapping[str, Tensor] = {}
                if work.prunes:
                    pruned = prune_maps(runner.load(kept), row, model.config, batches, student, work)
                solved = refit(partial(runner.load, kept), pruned, row, batches, student, base, work)
            if not all(bool(value.isfinite().all()) for value in solved.values()):
                raise _Unsolvable("the solution holds what is no number")
        file = scratch / f"{kept}.safetensors"
        arrays = [from_array(path, value.float().cpu().numpy(), DTYPES[spec.dtype]) for path, value in solved.items()]
        write_safetensors(file, arrays)
        stored = read_header(file)
        healed |= {row.in_block(kept, path): tensor for path, tensor in stored.items()}
        # the emulator goes on with what will be shipped, rounding included
        shipped = {path: read_tensor(tensor, torch.float32) for path, tensor in stored.items()}
        _advance(runner.load(kept, shipped), batches, student)
    progress(Event(stage, end, end))
    return healed


@contextlib.contextmanager
def _solvable(block: int) -> Iterator[None]:
    try:
        yield
    except _Unsolvable as error:
        raise IncompatibleError(
            f"what goes through the base gives no equations to solve for block {block}",
            reasons=[
                str(error)[:200],
                "its weights, or those of a block near it, may hold infinity or what is no number",
            ],
            next_step="check the base's weights; or drop blocks with --keep, and pack with --heal none",
        ) from None


def _stage(work: Work) -> str:
    if work.maps:
        return "healing by affine maps"
    return "healing by refit" if work.solves else "pruning by SparseGPT"


def _advance(block: LoadedBlock, batches: Sequence[Tensor], hidden: list[Tensor]) -> None:
    for position, ids in enumerate(batches):
        hidden[position] = block(ids, hidden[position])
