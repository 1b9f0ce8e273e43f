"""Input statistics of a block's output projection, and the new weights of its remaining columns after a removal.

Each token is weighted by the inverse square of the norm of its hidden state. Otherwise a few tokens with norms a
thousand times larger would alone decide which units remain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite.config import RefitMap
from offsite.model_owner.block_runner import captured_inputs
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import Moments, held_out_positions, judged_solutions
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem


@dataclass(frozen=True)
class ProjectionInputs:
    """An output projection with F inputs and H outputs, and the weighted Gram matrices of its inputs.

    With a bias, the Gram matrices have one more row and column, for an input that is always 1.
    """

    weight: Tensor  # (H, F), float64
    bias: Tensor | None  # (H,), float64
    scale: Tensor | None  # (H,): the learned scale by which the block multiplies the projection's output
    fitted: Tensor  # (F, F) or (F + 1, F + 1), float32
    judge: Tensor  # the same over the held-out batches

    def problem(self, size: int) -> UnitProblem:
        """The input of a rule that chooses which units to remove; each unit has `size` consecutive inputs."""
        inputs = self.weight.shape[1]
        gram = (self.fitted + self.judge)[:inputs, :inputs].double()
        weight = self.weight if self.scale is None else self.weight * self.scale.double()[:, None]
        return UnitProblem(gram, weight, size)

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


def projection_inputs(problem: BlockProblem, found: Mapping[str, Tensor], part: RefitMap) -> ProjectionInputs:
    """Run a block over all batches, and sum the Gram matrices of the inputs of one of its output projections.

    Args:
        problem: the block, with its inputs.
        found: tensors of the block that earlier steps changed, keyed by their path in the block.
        part: the part of the block that the projection ends, "mlp" or "attention".
    """
    family, block = problem.family, problem.load(found)
    parameters, names = dict(block.module.named_parameters()), family.modules
    name, scale = family.output_of(part)
    path = names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    weight, bias = parameters[f"{path}.weight"].detach(), parameters.get(f"{path}.bias")
    factor = parameters.get(names.get(scale, scale)) if scale else None
    weight = weight.T if family.transposed else weight
    columns = weight.shape[1] + (bias is not None)
    fitted, judge = (torch.zeros(columns, columns, device=weight.device) for _ in range(2))
    linear = family.refit_way(part, problem.config) == "in closed form"
    for position, ids in enumerate(problem.batches):
        with captured_inputs(block, [path]) as seen:
            after = block(ids, problem.enters[position])
        inputs = seen[path].flatten(0, -2).float()  # (B * T, F)
        given = (
            after.flatten(0, -2) if linear else inputs @ weight.T
        )  # a norm behind makes the projection's own size count
        inputs = inputs / given.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        if bias is not None:
            inputs = torch.cat([inputs, 1 / given.norm(dim=-1, keepdim=True).clamp_min(1e-6)], dim=1)
        total = judge if position in held_out_positions(len(problem.batches)) else fitted
        total += inputs.T @ inputs
    return ProjectionInputs(weight.double(), None if bias is None else bias.detach().double(), factor, fitted, judge)
