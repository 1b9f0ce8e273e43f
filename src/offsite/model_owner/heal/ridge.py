"""Ridge regression that changes one linear layer so that a block's output comes close to a target.

Each token has the weight 1 / norm of its target. The ridge is chosen by the error on every eighth batch; then the
problem is solved on all batches. Sums are in float32 on the device, the solution is in float64.
docs/decisions/0004-refit.md gives the reasons.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGES = (0.03, 0.1, 0.3, 1.0)  # times the mean of the Gram matrix's diagonal
USUAL_RIDGE = 0.1  # used if there are too few batches to hold one out
HELD_OUT = 8  # one batch in this many is held out to choose the ridge


@dataclass
class Moments:
    """The sums of a weighted least squares problem with inputs (F,) and errors (H,), in float32 on the device."""

    gram: Tensor  # (F, F)
    cross: Tensor  # (F, H)
    square: float = field(default=0.0)

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """The sums over no rows."""
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, inputs: Tensor, errors: Tensor, weights: Tensor) -> None:
        """Add N tokens: the layer's inputs (N, F), errors (N, H), and the weight of each token (N, 1)."""
        weighted = inputs * weights
        self.gram += weighted.T @ inputs
        self.cross += weighted.T @ errors
        self.square += float((weights * errors.square()).sum())

    def plus(self, other: "Moments") -> "Moments":
        """The sums over the rows of both."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    def error(self, change: Tensor) -> float:
        """The weighted squared error that remains after `change` (F, H) is added to the layer."""
        gram, cross = self.gram.double(), self.cross.double()
        return self.square - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())


class RidgeProblem:
    """The problem of changing a linear layer with F inputs so that its block's output comes close to a target.

    Batches are added one by one.
    """

    def __init__(self, inputs: int, outputs: int, batches: int, device: torch.device, *, bias: bool) -> None:
        self._bias, self._batches = bias, batches
        columns = inputs + bias  # a bias is the weight of a last input that is always 1
        self._fitted, self._held_out = (Moments.zeros(columns, outputs, device) for _ in range(2))

    def add(self, position: int, inputs: Tensor, after: Tensor, target: Tensor, factor: Tensor | None = None) -> None:
        """Add a batch, or some tokens of it.

        Args:
            position: of the batch.
            inputs: of the layer, (..., F).
            after: the block's output, (..., H).
            target: the wanted output of the block, (..., H).
            factor: of the layer's output in the block, one number for each token, (..., 1); None: 1 for all.
        """
        features = inputs.flatten(0, -2).float()  # (N, F)
        if self._bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if factor is not None:
            features = features * factor.flatten(0, -2)
        # a few tokens have a norm a thousand times larger; unweighted, only those would be fitted
        scale = target.flatten(0, -2).norm(dim=-1, keepdim=True).clamp_min(1e-6).reciprocal()  # (B * T, 1)
        moments = self._held_out if position in held_out_positions(self._batches) else self._fitted
        moments.add(features, (target - after).flatten(0, -2), scale)

    def gram(self) -> Tensor:
        """The weighted Gram matrix over all batches, (F, F), or (F + 1, F + 1) with a bias."""
        return self._fitted.gram + self._held_out.gram

    def change(self) -> Tensor:
        """The change of the layer, (F, H), or (F + 1, H) with a bias, in float64.

        Its ridge is the one with the smallest error on the held-out batches; where none lowers that error, nothing
        changes.
        """
        return self.solutions()[1]

    def solutions(self) -> tuple[Tensor, Tensor]:
        """The change of the layer, solved without the held-out batches and on all of them; see `change`."""
        return judged_solutions(self._fitted, self._held_out)


def judged_solutions(fitted: Moments, judge: Moments) -> tuple[Tensor, Tensor]:
    """The changes (F, H), in float64, that solve a problem on `fitted` alone, and on `fitted` and `judge` together.

    Their ridge is the one with the smallest error on `judge`; where none lowers that error, nothing changes.

    Args:
        fitted: the sums over the batches that are fitted while the ridge is chosen.
        judge: the sums over the held-out batches; all zero if there are none, which gives the usual ridge.
    """
    ridge, whole = USUAL_RIDGE, fitted.plus(judge)
    if not judge.square:
        return (_solution(whole, ridge),) * 2
    trials = {candidate: _solution(fitted, candidate) for candidate in RIDGES}
    errors = {candidate: judge.error(trial) for candidate, trial in trials.items()}
    ridge = min(errors, key=errors.__getitem__)
    if errors[ridge] >= judge.square:
        return (torch.zeros_like(trials[ridge]),) * 2
    return trials[ridge], _solution(whole, ridge)


def held_out_positions(batches: int) -> range:
    """Positions of the batches that choose the ridge: every eighth, or the last if there are fewer than eight.

    Empty if there is only one batch.
    """
    first = min(HELD_OUT, batches) - 1
    return range(first, batches, HELD_OUT) if first else range(0)


def _solution(moments: Moments, ridge: float) -> Tensor:
    return ridge_solution(moments.gram, moments.cross, ridge)


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The solution (F, H) in float64 of a ridge regression with these sums.

    Args:
        gram: the sum of x x^T over the inputs x, (F, F).
        cross: the sum of x e^T over inputs and errors, (F, H).
        ridge: times the mean of the Gram matrix's diagonal.
    """
    system = gram.double()
    mean = system.diagonal().mean()
    if mean == 0:  # all inputs of the layer are zero, so its outputs cannot change
        return torch.zeros_like(cross, dtype=torch.float64)
    system.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system))
