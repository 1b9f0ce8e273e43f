"""Refit: kept blocks are re-solved in closed form so that each stands in for the blocks dropped behind it.

For every kept block, the output projection of its MLP is solved anew by ridge regression toward its old weights, so
that the emulator's hidden state after the block is close to the base model's before the next kept block. Blocks are
solved in order on the emulator's own activations, so errors do not add up. Compare ReplaceMe (arXiv 2505.02819), which
solves for a map behind the MLP and on the base's activations. docs/decisions/0004-refit.md has what was measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from offsite.config import PackSpec
from offsite.core.checkpoint import TensorRange, from_array, read_header, write_safetensors
from offsite.core.family import Architecture
from offsite.core.load import read_tensor
from offsite.core.progress import Event, Progress
from offsite.core.runtime import runtime
from offsite.model_owner.base_model import BaseModel
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock, captured_inputs
from offsite.model_owner.compress.calibration import calibration_batches
from offsite.model_owner.compress.sparsegpt import prune_maps, pruned_in_order
from offsite.model_owner.split import DTYPES, Sandwich, Work, work_of

RIDGES = (0.03, 0.1, 0.3, 1.0)  # times the mean of the Gram matrix's diagonal
USUAL_RIDGE = 0.1  # where there is too little text to hold any out
HELD_OUT = 8  # every so many batches one chooses the ridge and is not fitted


def refit(
    model: BaseModel,
    sandwich: Sandwich,
    emulator: Sequence[int],
    spec: PackSpec,
    scratch: Path,
    progress: Progress,
    *,
    batches: Sequence[Tensor] | None = None,
) -> Mapping[str, TensorRange]:
    """Solve the output projections of the kept blocks anew, and prune all maps on the way if SparseGPT is to.

    Args:
        model: the base; its blocks are loaded one at a time.
        sandwich: how it is cut.
        emulator: base indices of the kept blocks of the middle.
        spec: calibration text, tokens, and the dtype that the bundle will have.
        scratch: a folder for the solved weights until the bundle is written.
        progress: where the events go.
        batches: token ids (B, T) to fit on, in place of the calibration text of `spec`.

    Returns:
        The changed tensors by base name, as they lie in files of `scratch`.

    Raises:
        DataError: the calibration text is unreadable or too short.
    """
    row = model.row
    machine = runtime(spec.device, spec.compute, spec.threads)
    runner = BlockRunner(model, machine)
    if batches is None:
        batches = calibration_batches(model, spec.calibration, spec.calibration_tokens)
    batches = [ids.to(machine.device) for ids in batches]
    work = work_of(sandwich.middle, spec)
    stage, end = "healing by refit" if work.solves else "pruning by SparseGPT", sandwich.middle[-1] + 1
    base = [runner.load(0).embed(ids) for ids in batches]
    for index in sandwich.bottom:
        _advance(runner.load(index), batches, base)
    student = list(base)  # the emulator's hidden state, from here on its own
    done = len(sandwich.bottom)
    healed: dict[str, TensorRange] = {}
    for kept, following in pairwise((*emulator, end)):
        while done < following:
            progress(Event(stage, done, end))
            _advance(runner.load(done), batches, base)
            done += 1
        pruned = prune_maps(runner.load(kept), row, batches, student, work.prunes) if work.prunes else {}
        block = runner.load(kept, pruned)
        solved = {**pruned, **_solve(block, row, batches, student, base, work)}
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


def _advance(block: LoadedBlock, batches: Sequence[Tensor], hidden: list[Tensor]) -> None:
    for position, ids in enumerate(batches):
        hidden[position] = block(ids, hidden[position])


@dataclass
class _Moments:
    """Sums of a weighted least squares problem: inputs (F,), errors (H,), in float32 on the device."""

    gram: Tensor  # (F, F)
    cross: Tensor  # (F, H)
    square: float = field(default=0.0)

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "_Moments":
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, inputs: Tensor, errors: Tensor, weights: Tensor) -> None:
        """Rows (N, F) and (N, H) with weights (N, 1)."""
        weighted = inputs * weights
        self.gram += weighted.T @ inputs
        self.cross += weighted.T @ errors
        self.square += float((weights * errors.square()).sum())

    def plus(self, other: "_Moments") -> "_Moments":
        """The sums over both sets of rows."""
        return _Moments(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    def error(self, change: Tensor) -> float:
        """Weighted squared error that is left after adding `change` (F, H) to the map."""
        gram, cross = self.gram.double(), self.cross.double()
        return self.square - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())


def _solve(
    block: LoadedBlock,
    row: Architecture,
    batches: Sequence[Tensor],
    student: Sequence[Tensor],
    targets: Sequence[Tensor],
    work: Work,
) -> dict[str, Tensor]:
    """New weight (and bias, where there is one) of the linear map that ends the MLP, by path in the block in files.

    Where a block multiplies what the map gives by a learned scale, the problem is solved behind it.

    Args:
        block: the block, its other maps as they will be shipped.
        row: of its family.
        batches: token ids (B, T), or pixels of pictures.
        student: what enters the block in the emulator, (B, T, H) for each batch.
        targets: what should leave it.
        work: whether the map is solved anew, and which share of it is pruned then.
    """
    parameters, transposed = dict(block.module.named_parameters()), row.transposed
    path = row.modules.get(f"{row.mlp_out}.weight", f"{row.mlp_out}.weight").removesuffix(".weight")
    scale_of_map = parameters.get(row.modules.get(row.mlp_scale, row.mlp_scale)) if row.mlp_scale else None
    weight, bias = parameters[f"{path}.weight"].double(), parameters.get(f"{path}.bias")
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    columns = inputs + (bias is not None)  # a bias is the weight of an input that is always 1
    fitted, held_out = (_Moments.zeros(columns, outputs, weight.device) for _ in range(2))
    for position, ids in enumerate(batches):
        with captured_inputs(block, [path]) as seen:
            after = block(ids, student[position])
        target = targets[position]
        features = seen[path].flatten(0, -2).float()  # (B * T, F)
        if bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        # a few tokens have a thousand times the others' norm; plain squares would fit those alone
        scale = target.flatten(0, -2).norm(dim=-1, keepdim=True).clamp_min(1e-6).reciprocal()  # (B * T, 1)
        moments = held_out if position in _held_out(len(batches)) else fitted
        moments.add(features, (target - after).flatten(0, -2), scale)
    moments = fitted.plus(held_out)
    change = _best_change(fitted, held_out) if work.solves else torch.zeros_like(moments.cross).double()  # (F, H)
    if scale_of_map is not None:  # an output that is scaled to next to nothing stays as it is
        by = scale_of_map.double()
        change = change * torch.where(by.abs() > 1e-6 * by.abs().max(), 1 / by, 0.0)
    matrix = (weight.T if transposed else weight) + change[:inputs].T  # (H, F)
    if work.prunes:
        matrix = pruned_in_order(matrix, moments.gram[:inputs, :inputs], work.prunes)
    solved = {f"{row.mlp_out}.weight": matrix.T if transposed else matrix}
    if bias is not None:
        solved[f"{row.mlp_out}.bias"] = bias.double() + change[inputs]
    return {name: value.detach().contiguous() for name, value in solved.items()}


def _held_out(batches: int) -> range:
    """Positions of the batches that choose the ridge: every eighth, or the last of a few; none of a single one."""
    first = min(HELD_OUT, batches) - 1
    return range(first, batches, HELD_OUT) if first else range(0)


def _best_change(fitted: _Moments, judge: _Moments) -> Tensor:
    """The ridge solution (F, H) in float64: the ridge whose error on `judge` is least, then solved on all tokens."""
    ridge = USUAL_RIDGE
    if judge.square:
        ridge = min(RIDGES, key=lambda candidate: judge.error(_ridge_solution(fitted, candidate)))
    return _ridge_solution(fitted.plus(judge), ridge)


def _ridge_solution(moments: _Moments, ridge: float) -> Tensor:
    system = moments.gram.double()
    system.diagonal().add_(ridge * system.diagonal().mean())
    return torch.cholesky_solve(moments.cross.double(), torch.linalg.cholesky(system))
