"""Narrows, prunes and heals the kept blocks one after the other.

A block's inputs are the outputs of the changed blocks before it. Its target outputs are the base's hidden states before
the next kept block, so errors do not accumulate. Only one block's weights are in memory at a time, and large hidden
states are in files. After each kept block a resume point is written.
"""

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from offsite.config import PackSpec
from offsite.kernels.runtime import resolve_runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock
from offsite.model_owner.bundle_tensors import DTYPES
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.calibration.calibration_text import row_form
from offsite.model_owner.compress.calibrated_pruning import prune_layers
from offsite.model_owner.compress.pruner_protocol import pruning
from offsite.model_owner.emulator_work import Work, work_of
from offsite.model_owner.heal.block_step_protocol import BlockProblem, block_step
from offsite.model_owner.heal.hidden_states import FinishedBlock, HiddenStates, StatesFolder
from offsite.model_owner.heal.output_layers import change_outputs
from offsite.model_owner.heal.unsolvable import Unsolvable, explain_unsolvable
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.model_owner.narrow.loss_statistics import LossStatistics
from offsite.model_owner.narrow.remove_units import remove_units
from offsite.model_owner.sandwich import Sandwich
from offsite.models.block_widths import Kept, Widths
from offsite.models.families.family import Architecture
from offsite.models.torch_tensors import read_tensor
from offsite.progress import Event, Progress
from offsite.storage.files import replace_file
from offsite.storage.safetensors_files import TensorRange, from_array, read_header, write_safetensors

_KEPT = "kept.json"  # in the scratch folder: the heads, neurons and experts that stay
_Step = Callable[[BlockProblem, Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Solved:
    """The result of narrowing, pruning and healing all kept blocks."""

    # the changed tensors, and those of affine layers after blocks; keys are tensor names in the base
    tensors: Mapping[str, TensorRange]
    kept: Mapping[int, Kept]  # base index of each narrowed block -> its heads, neurons and experts that remain


def block_by_block(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    spec: PackSpec,
    scratch: Path,
    progress: Progress,
    *,
    widths: Sequence[Widths] | None = None,
    statistics: Mapping[int, LossStatistics] | None = None,
    batches: Sequence[Tensor] | None = None,
    record: Path | None = None,
) -> Solved:
    """Narrow, prune and heal every kept block as the settings say, on calibration data.

    Args:
        model: the opened base; its blocks are loaded one at a time.
        sandwich: the split of the base into bottom, middle and top.
        emulator: base indices of the kept blocks of the middle.
        spec: the settings of narrowing, healing, pruning and calibration, and the bundle's dtype.
        scratch: a folder for the changed weights, and large hidden states, until the bundle is written.
        progress: receives the progress events.
        widths: the new numbers of heads, neurons and experts of the kept blocks, in their order; None if blocks are not
            narrowed.
        statistics: how the base's loss depends on each kept block, by base index; None for rules that do not need it.
        batches: token ids (B, T) or pixels (B, 3, Y, X) to use instead of the calibration data of `spec`.
        record: the file of the resume point. If it exists, the work continues after the last finished block, with what
            `scratch` holds. None writes no resume points.

    Returns:
        The changed tensors, whose values are in files of `scratch`, and the heads, neurons and experts that remain in
        narrowed blocks.

    Raises:
        DataError: the calibration text is unreadable or too short.
        IncompatibleError: activations of the base are not finite, so no solution exists; or a block does not call one
            of its linear layers, so its inputs are unknown.
        StorageError: a file cannot be written, or the resume point is damaged.
    """
    family = model.family
    machine = resolve_runtime(spec.runtime.device, spec.runtime.compute, spec.runtime.threads)
    runner = BlockRunner(model, machine)
    if batches is None:
        batches = calibration_batches(model, spec.calibration.source, spec.calibration.tokens, row_form(spec))
    batches = [ids.to(machine.device) for ids in batches]
    work = work_of(sandwich.middle, spec)
    stage, steps, end = _stage(work), _steps(family, work, spec), sandwich.middle[-1] + 1
    folder = StatesFolder(scratch, record, machine.device)
    point = folder.load() or _first_states(runner, sandwich, batches, folder)
    own_states, base_states, done = point.own, point.base, point.base_blocks
    places = sorted((*emulator, *sandwich.spread))
    finished = [kept for kept in emulator if kept <= point.block]
    before = read_solved(model, finished, scratch)
    healed, stays = dict(before.tensors), dict(before.kept)
    wanted = dict(zip(sorted(emulator), widths, strict=True)) if widths is not None else {}
    for kept, following in pairwise((*(one for one in places if one > point.block), end)):
        while done < following:
            progress(Event(stage, done, end))
            base_states = _advance(runner.load(done), batches, base_states, folder, own_states)
            done += 1
        if kept in sandwich.spread:  # a trained block is shipped unchanged
            own_states = _advance(runner.load(kept), batches, own_states, folder, base_states)
            continue
        problem = BlockProblem(
            partial(runner.load, kept),
            family,
            model.config,
            batches,
            own_states,
            base_states,
            model.block(kept).keys(),
            statistics[kept] if statistics else None,
        )
        first = _narrowing(model, kept, wanted[kept], spec, stays) if kept in wanted else []
        stored = _store(scratch / f"{kept}.safetensors", _solve(problem, [*first, *steps], kept), DTYPES[spec.dtype])
        healed |= {family.in_block(kept, path): tensor for path, tensor in stored.items()}
        # the next blocks see the weights as shipped, with their rounding
        shipped = {path: read_tensor(tensor, torch.float32) for path, tensor in stored.items()}
        own_states = _advance(runner.load(kept, shipped), batches, own_states, folder, base_states)
        _write_kept(scratch, stays)
        folder.save(FinishedBlock(kept, done, own_states, base_states))
    progress(Event(stage, end, end))
    _write_kept(scratch, stays)
    return Solved(healed, stays)


def _first_states(
    runner: BlockRunner, sandwich: Sandwich, batches: Sequence[Tensor], folder: StatesFolder
) -> FinishedBlock:
    """The hidden states after the bottom, which base and emulator share, as the point from which to start."""
    first = runner.load(0)
    states = folder.keep(first.embed(ids) for ids in batches)
    for index in sandwich.bottom:
        states = _advance(runner.load(index), batches, states, folder)
    return FinishedBlock(-1, len(sandwich.bottom), states, states)


def read_solved(model: BaseModel, emulator: Sequence[int], scratch: Path) -> Solved:
    """Read the result of an earlier, completed call of `block_by_block` from its files in `scratch`."""
    family = model.family
    tensors: dict[str, TensorRange] = {}
    for index in sorted(set(emulator)):
        held = read_header(scratch / f"{index}.safetensors")
        tensors |= {family.in_block(index, path): tensor for path, tensor in held.items()}
    return Solved(tensors, _read_kept(scratch))


def _write_kept(scratch: Path, stays: Mapping[int, Kept]) -> None:
    """Store which heads, neurons and experts remain in narrowed blocks, keyed by the block's index in the base."""
    replace_file(scratch / _KEPT, json.dumps({index: asdict(one) for index, one in stays.items()}).encode())


def _read_kept(scratch: Path) -> dict[int, Kept]:
    """Read what `_write_kept` stored; {} if it stored nothing yet."""
    file = scratch / _KEPT
    kept = json.loads(file.read_bytes()) if file.exists() else {}
    return {int(index): Kept(**{part: tuple(at) for part, at in one.items()}) for index, one in kept.items()}


def _narrowing(
    model: BaseModel, index: int, widths: Widths, spec: PackSpec, stays: MutableMapping[int, Kept]
) -> list[_Step]:
    """A list with the step that narrows a block; empty if the block keeps all its heads, neurons and experts.

    Args:
        model: the opened base.
        index: the block's index in the base.
        widths: the block's new numbers of heads, neurons and experts.
        spec: the settings, with the rule that chooses which to remove.
        stays: when the step runs, it stores here, under `index`, which heads, neurons and experts remain.
    """
    base = base_widths(model, index)

    def narrow(problem: BlockProblem, _: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found, stays[index] = remove_units(problem, spec.unit_rule, base, widths)
        return found

    return [narrow] if widths != base else []


def _solve(problem: BlockProblem, steps: Sequence[_Step], block: int) -> dict[str, Tensor]:
    """Run the steps that change a block, and return its new tensors, keyed by their path in the block.

    Args:
        problem: the block, with its inputs and targets.
        steps: functions that get the problem and the tensors changed so far, and return further changed tensors.
        block: the block's index in the base, for error messages.

    Raises:
        IncompatibleError: activations of the base are not finite, so no solution exists.
    """
    solved: dict[str, Tensor] = {}
    with explain_unsolvable(block):
        for step in steps:
            solved |= step(problem, solved)
        if not all(bool(value.isfinite().all()) for value in solved.values()):
            raise Unsolvable("the solution holds values that are not finite")
    return solved


def _store(file: Path, solved: Mapping[str, Tensor], dtype: str) -> Mapping[str, TensorRange]:
    """Write a block's new tensors to a file in the bundle's dtype, and return their byte ranges in it."""
    arrays = [from_array(path, value.float().cpu().numpy(), dtype) for path, value in solved.items()]
    file.unlink(missing_ok=True)  # of an interrupted run
    write_safetensors(file, arrays)
    return read_header(file)


def _steps(family: Architecture, work: Work, spec: PackSpec) -> list[_Step]:
    """The functions that prune and heal a block, in the order in which they run.

    A layer that a healing step solves is pruned by that step, after it is solved. Other layers are pruned before
    healing. With some pruners, the MLP's output projection is pruned last.
    """
    healing = [block_step(row) for row in work.block_steps]
    if work.pruner is None:
        return [partial(step.solve_block, spec=spec, pruning=None) for step in healing]
    pruner = pruning(work.pruner, work.share)
    solved = {path for step in healing for path in step.solved_layers(family, spec)}
    last = set(family.output_layers("mlp")) - solved if work.pruner.mlp_output_last else set()
    return [
        partial(prune_layers, pruning=pruner, spared=solved | last),
        *(partial(step.solve_block, spec=spec, pruning=pruner) for step in healing),
        *([partial(change_outputs, part="mlp", pruning=pruner, solves=False)] if last else []),
    ]


def _stage(work: Work) -> str:
    """What the progress display calls this work, such as "healing by refit"."""
    healing = [step.name for step in work.block_steps]
    if healing:
        return f"healing by {', '.join(healing)}"
    if work.narrows:
        return "narrowing the blocks"
    return f"pruning by {work.pruner.name}" if work.pruner else "running the blocks"


def _advance(
    block: LoadedBlock,
    batches: Sequence[Tensor],
    states: HiddenStates,
    folder: StatesFolder,
    still_used: HiddenStates | None = None,
) -> HiddenStates:
    """Run a block on the hidden states of every batch, and return its outputs.

    The file of `states` is deleted, unless the hidden states `still_used` are in it (None: no others are used).
    """
    after = folder.keep(block(ids, states[position]) for position, ids in enumerate(batches))
    folder.discard(states, still_used)
    return after
