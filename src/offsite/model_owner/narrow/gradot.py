"""Removal of units by how little it changes the gradients of adapters: GradOT's score of channels (arXiv 2507.04455).

The score of a change d of a weight is |H d|_1 - lambda g.d, with the loss's gradient g and its Hessian H in the K-FAC
approximation: a small first term keeps the gradients of adapters, and a large second term makes the emulator's own
loss worse. Removing unit u, with columns w_u, changes the output projection by -w_u, so the first term is the sum of
the magnitudes of M w_u A_u:, with the metric M of the output and the Gram matrix A of the inputs; the loss grows by
-g.w_u to first order. The paper scores channels of the MLP so, and reduces the rank in attention; here it scores both
neurons and heads, and the other units compensate as for every rule. Both terms are divided by their mean magnitude over
the units, so lambda has no unit; the value is ours.
"""

import torch

from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem

LAMBDA = 0.1  # how much a growing loss of the emulator counts


def order_units(problem: UnitProblem, stay: int) -> list[int]:
    """The indices of the units to remove, lowest score first, so that `stay` units remain.

    Raises:
        ValueError: the problem has no metric or no gradient.
    """
    if problem.metric is None or problem.gradient is None:
        raise ValueError("the score needs the metric and the gradient of the loss")
    units, size = problem.units, problem.size
    turned = (problem.metric @ problem.weight).reshape(-1, units, size)  # (H, units, size): M w_u
    inputs = problem.gram.reshape(units, size, -1)  # (units, size, F): A_u:
    changes = torch.stack([(turned[:, unit] @ inputs[unit]).abs().sum() for unit in range(units)])
    growth = -(problem.gradient * problem.weight).reshape(-1, units, size).sum(dim=(0, 2))  # (units,)
    score = _over_mean(changes) - LAMBDA * _over_mean(growth)
    order: list[int] = score.argsort(stable=True).tolist()
    return order[: units - stay]


def _over_mean(values: torch.Tensor) -> torch.Tensor:
    """The values divided by their mean magnitude."""
    return values / values.abs().mean().clamp_min(1e-300)
