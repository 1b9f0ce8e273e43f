"""Removal of units by second-order saliency: the output error that remains after the other units compensate.

The optimal brain surgeon for structures, as in ZipLM (arXiv 2302.04089), SlimGPT (2412.18110) and OSSCAR (2403.12983).
X are the inputs of the output projection, H = X^T X + damping, and w_u the projection's columns for unit u. Removing u
costs tr(w_u [H^-1]_uu^-1 w_u^T). All columns then change by -w_u [H^-1]_uu^-1 [H^-1]_u:, and the rows and columns of u
are removed from H^-1. With a metric M = L L^T of the output, L^T w_u stands in the place of w_u.
"""

import torch

from offsite.model_owner.narrow.unit_rule_protocol import DAMPING, UnitProblem

_STEPS = 128  # at least so many removals, each followed by an update of the others


def order_units(problem: UnitProblem, stay: int) -> list[int]:
    """The indices of the units to remove, in the order of removal, so that `stay` units remain.

    If there are many units, several are removed in each step; the others then compensate for all of them together.
    """
    units, size = problem.units, problem.size
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(problem.gram)))  # (F, F)
    left = problem.weighted.T.clone()  # (F, H): the columns, with what they make up for
    order: list[int] = []
    removed = torch.zeros(units, dtype=torch.bool, device=left.device)
    while len(order) < units - stay:
        cost = _costs(inverse, left, size)
        cost[removed] = torch.inf
        together = cost.argsort(stable=True)[: min(max(1, units // _STEPS), units - stay - len(order))]
        rows = (together[:, None] * size + torch.arange(size, device=left.device)).flatten()
        solved = _solved(inverse[rows][:, rows], torch.cat([left[rows], inverse[rows]], dim=1))
        change = inverse[:, rows] @ solved  # (F, H + F)
        left -= change[:, : left.shape[1]]
        inverse -= change[:, left.shape[1] :]
        inverse[rows], inverse[:, rows], left[rows] = 0, 0, 0
        inverse[rows, rows] = 1  # so that the rows of removed units can be solved for
        removed[together] = True
        order += together.tolist()
    return order


def damped(gram: torch.Tensor) -> torch.Tensor:
    """A Gram matrix (F, F) plus a multiple of the identity, so that it has an inverse."""
    system = gram.clone()
    system.diagonal().add_(DAMPING * system.diagonal().mean().clamp_min(1e-30))
    return system


def _costs(inverse: torch.Tensor, left: torch.Tensor, size: int) -> torch.Tensor:
    """The output error that remains if one unit is removed and the others compensate, for each unit, (units,).

    Args:
        inverse: the inverse of the damped Gram matrix, (F, F).
        left: the current columns of the output projection, (F, H).
        size: number of columns of each unit.
    """
    if size == 1:
        return left.square().sum(1) / inverse.diagonal()
    units = len(left) // size
    grams = inverse.reshape(units, size, units, size)
    own = grams.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, size, size)
    columns = left.reshape(units, size, -1)  # (units, size, H)
    return (columns * _solved(own, columns)).sum(dim=(1, 2))


def _solved(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution X (..., n, k) of A X = B, for one or more symmetric positive definite A (..., n, n), B (..., n, k).

    Not by torch.linalg.solve: its LU of several matrices at once on several threads gives wrong results with some CPUs
    (torch 2.13 with oneMKL on an AMD EPYC, for matrices of 192 rows).
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(system))
