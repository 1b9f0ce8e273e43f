"""Ridge regression that changes one linear layer so that a block's output comes close to a target.

Each token has the weight 1 / norm of its target. The ridge penalty is chosen by the error on every eighth batch, which
is held out; then the problem is solved on all batches. Sums are in float32 on the device, the solution is in float64.
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
    """The sums of a weighted least squares problem over tokens with inputs x (F,) and errors e (H,), in float32.

    The problem is to find the change of a linear layer that removes the errors.
    """

    gram: Tensor  # (F, F): weighted sum of x x^T
    cross: Tensor  # (F, H): weighted sum of x e^T
    square: float = field(default=0.0)  # weighted sum of the squared errors

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """The sums before any token is added: zeros."""
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, inputs: Tensor, errors: Tensor, weights: Tensor) -> None:
        """Add N tokens: the layer's inputs (N, F), errors (N, H), and the weight of each token (N, 1)."""
        weighted = inputs * weights
        self.gram += weighted.T @ inputs
        self.cross += weighted.T @ errors
        self.square += float((weights * errors.square()).sum())

    def plus(self, other: "Moments") -> "Moments":
        """The sums over the tokens of this object and of `other`."""
        return Moments(self.gram + other.gram, self.cross + other.cross, self.square + other.square)

    def error(self, change: Tensor) -> float:
        """The weighted squared error that remains after `change` (F, H) is added to the layer's weights."""
        gram, cross = self.gram.double(), self.cross.double()
        return self.square - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())


class RidgeProblem:
    """The least squares problem of changing a linear layer with F inputs so that its block's output matches a target.

    Batches are added one by one with `add`; `change` returns the solution.

    Args:
        inputs: F, the layer's number of inputs.
        outputs: H, its number of outputs.
        batches: the number of batches that will be added.
        device: where the sums are.
        bias: whether the layer has a bias, which is changed too.
    """

    def __init__(self, inputs: int, outputs: int, batches: int, device: torch.device, *, bias: bool) -> None:
        self._bias, self._batches = bias, batches
        columns = inputs + bias  # a bias is the weight of a last input that is always 1
        self._fitted, self._held_out = (Moments.zeros(columns, outputs, device) for _ in range(2))

    def add(self, position: int, inputs: Tensor, after: Tensor, target: Tensor, factor: Tensor | None = None) -> None:
        """Add a batch, or some tokens of it, to the sums.

        Args:
            position: the index of the batch; every eighth batch is held out, see `held_out_positions`.
            inputs: the layer's inputs, (..., F).
            after: the block's current output, (..., H).
            target: the target output of the block, (..., H).
            factor: the factor by which the block multiplies the layer's output for each token, (..., 1); None means 1.
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
        """The change of the layer's weights that solves the problem, (F, H), or (F + 1, H) with a bias, in float64.

        The ridge penalty is the one with the smallest error on the held-out batches. If no penalty lowers that error,
        the change is zero.
        """
        return self.solutions()[1]

    def solutions(self) -> tuple[Tensor, Tensor]:
        """Two changes of the layer's weights, see `change`: fitted without the held-out batches, and on all batches."""
        return judged_solutions(self._fitted, self._held_out)


def judged_solutions(fitted: Moments, judge: Moments) -> tuple[Tensor, Tensor]:
    """Two solutions (F, H) of a least squares problem, in float64: on `fitted` alone, and on `fitted` plus `judge`.

    The ridge penalty is the one with the smallest error on `judge`. If no penalty lowers that error, both solutions are
    zero.

    Args:
        fitted: the sums over the batches that are not held out.
        judge: the sums over the held-out batches; if they are zero, the default penalty is used.
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
    """Indices of the held-out batches, given the number of batches: every eighth, or the last of fewer than eight.

    Empty if there is only one batch.
    """
    first = min(HELD_OUT, batches) - 1
    return range(first, batches, HELD_OUT) if first else range(0)


def _solution(moments: Moments, ridge: float) -> Tensor:
    return ridge_solution(moments.gram, moments.cross, ridge)


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The solution (F, H) of a ridge regression, in float64.

    Args:
        gram: the sum of x x^T over the inputs x, (F, F).
        cross: the sum of x e^T over inputs x and errors e, (F, H).
        ridge: the penalty, as a multiple of the mean of the Gram matrix's diagonal.
    """
    system = gram.double()
    mean = system.diagonal().mean()
    if mean == 0:  # all inputs of the layer are zero, so its outputs cannot change
        return torch.zeros_like(cross, dtype=torch.float64)
    system.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system))
