"""Input statistics of a block's output projection, and the new weights of its remaining columns after a removal.

Each token is weighted by the inverse square of the norm of its hidden state. Otherwise a few tokens with norms a
thousand times larger would alone decide which units remain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite.config import RefitMap
from offsite.model_owner.block_runner import LoadedBlock, captured_inputs
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import Moments, held_out_positions, judged_solutions
from offsite.model_owner.narrow.loss_statistics import LossStatistics
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem


@dataclass(frozen=True)
class ProjectionInputs:
    """An output projection with F inputs and H outputs, and the weighted Gram matrices of its inputs.

    With a bias, the Gram matrices have one more row and column, for an input that is always 1.
    """

    part: RefitMap  # of the block, which the projection ends
    weight: Tensor  # (H, F), float64
    bias: Tensor | None  # (H,), float64
    scale: Tensor | None  # (H,): the learned scale by which the block multiplies the projection's output
    fitted: Tensor  # (F, F) or (F + 1, F + 1), float32
    judge: Tensor  # the same over the held-out batches

    def problem(self, size: int, loss: LossStatistics | None = None) -> UnitProblem:
        """The input of a rule that chooses which units to remove.

        Args:
            size: number of consecutive inputs of each unit.
            loss: how the base's loss depends on the block; None for rules that do not need it.
        """
        inputs = self.weight.shape[1]
        gram = (self.fitted + self.judge)[:inputs, :inputs].double()
        weight = self.weight if self.scale is None else self.weight * self.scale.double()[:, None]
        if loss is None:
            return UnitProblem(gram, weight, size)
        return UnitProblem(gram, weight, size, loss.metric.double(), loss.gradients[self.part].double())

    def compensated(self, stay: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The weight (H, len(stay)) and bias (H,) of the projection without the other inputs, in float64.

        Ridge regression fits the change of the remaining columns to the lost output of the removed columns.

        Args:
            stay: indices of the inputs that remain.
        """
        inputs = self.weight.shape[1]
        kept = torch.tensor(stay, dtype=torch.long, device=self.weight.device)
        gone = torch.ones(inputs, dtype=torch.bool, device=self.weight.device)
        gone[kept] = False
        removed = gone.nonzero().flatten()
        lost = self.weight[:, removed].T.float()  # (removed, H)
        rows = kept if self.bias is None else torch.cat([kept, kept.new_tensor([inputs])])
        fitted, judge = (_moments(gram, rows, removed, lost) for gram in (self.fitted, self.judge))
        change = judged_solutions(fitted, judge)[1]
        weight = self.weight[:, kept] + change[: len(kept)].T
        return weight, None if self.bias is None else self.bias + change[len(kept)]


def _moments(gram: Tensor, rows: Tensor, removed: Tensor, lost: Tensor) -> Moments:
    """The sums of the least squares problem in which the inputs `rows` predict the output of the removed inputs.

    Args:
        gram: the weighted Gram matrix of all inputs.
        rows: indices of the inputs that remain, and of the bias.
        removed: indices of the removed inputs.
        lost: the weights of the removed inputs, (removed, H).
    """
    across = gram[rows][:, removed]
    square = float(((gram[removed][:, removed] @ lost) * lost).sum())
    return Moments(gram[rows][:, rows], across @ lost, square)


def projection_inputs(
    problem: BlockProblem, found: Mapping[str, Tensor], parts: Sequence[RefitMap]
) -> dict[RefitMap, ProjectionInputs]:
    """Run a block over all batches, and sum the Gram matrices of the inputs of some of its output projections.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block.
        parts: the parts of the block that the projections end, "mlp" and "attention".

    Returns:
        The projections and their Gram matrices, by part.
    """
    block = problem.load(found)
    sums = {part: _Sums(problem, block, part) for part in parts}
    held_out = held_out_positions(len(problem.batches))
    for position, ids in enumerate(problem.batches):
        with captured_inputs(block, [one.path for one in sums.values()]) as seen:
            after = block(ids, problem.enters[position])
        for one in sums.values():
            one.add(seen[one.path].flatten(0, -2).float(), after.flatten(0, -2), held_out=position in held_out)
    return {part: one.result() for part, one in sums.items()}


class _Sums:
    """The Gram matrices of one output projection's inputs, summed batch by batch.

    Args:
        problem: the block, with its family.
        block: the loaded block.
        part: the part of the block that the projection ends.
    """

    def __init__(self, problem: BlockProblem, block: LoadedBlock, part: RefitMap) -> None:
        family, parameters = problem.family, dict(block.module.named_parameters())
        name, scale = family.output_of(part)
        self._part = part
        self.path = family.modules.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        weight = parameters[f"{self.path}.weight"].detach()
        self._weight = weight.T if family.transposed else weight  # (H, F)
        self._bias = parameters.get(f"{self.path}.bias")
        self._scale = parameters.get(family.modules.get(scale, scale)) if scale else None
        self._linear = family.refit_way(part, problem.config) == "in closed form"
        columns = self._weight.shape[1] + (self._bias is not None)
        self._fitted, self._judge = (torch.zeros(columns, columns, device=weight.device) for _ in range(2))

    def add(self, inputs: Tensor, after: Tensor, *, held_out: bool) -> None:
        """Add a batch: the projection's inputs (N, F) and the block's outputs (N, H), for N tokens."""
        # a norm behind the projection makes the size of the projection's own output count
        norms = (after if self._linear else inputs @ self._weight.T).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        inputs = inputs / norms
        if self._bias is not None:
            inputs = torch.cat([inputs, 1 / norms], dim=1)
        total = self._judge if held_out else self._fitted
        total += inputs.T @ inputs

    def result(self) -> ProjectionInputs:
        """The projection with the sums of all batches."""
        bias = None if self._bias is None else self._bias.detach().double()
        return ProjectionInputs(self._part, self._weight.double(), bias, self._scale, self._fitted, self._judge)
