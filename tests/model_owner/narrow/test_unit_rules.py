"""The rules that choose units, against brute force on small problems."""

import itertools

import torch

from offsite.model_owner.narrow import energy, obs
from offsite.model_owner.narrow.unit_rule_protocol import DAMPING, UnitProblem


def problem(units: int, size: int, seed: int = 0) -> UnitProblem:
    """Inputs that depend on each other, so that some units can be made up for by others."""
    torch.manual_seed(seed)
    inputs = units * size
    mixed = torch.randn(400, inputs // 2, dtype=torch.float64) @ torch.randn(inputs // 2, inputs, dtype=torch.float64)
    mixed += 0.3 * torch.randn(400, inputs, dtype=torch.float64)
    return UnitProblem(mixed.T @ mixed, torch.randn(12, inputs, dtype=torch.float64), size)


def columns(units: list[int], size: int) -> list[int]:
    return [unit * size + one for unit in sorted(units) for one in range(size)]


def error(found: UnitProblem, removed: list[int], damping: float) -> float:
    """What is left of the damped problem's error when all units that stay are solved again."""
    gram = found.gram.clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    gone = columns(removed, found.size)
    stay = [one for one in range(len(gram)) if one not in gone]
    across = gram[stay][:, gone]
    schur = gram[gone][:, gone] - across.T @ torch.linalg.solve(gram[stay][:, stay], across)
    return float(torch.trace(found.weight[:, gone] @ schur @ found.weight[:, gone].T))


def test_second_order_removal_takes_the_unit_that_costs_least_at_every_step() -> None:
    for size in (1, 3):
        found = problem(8, size)
        order = obs.order_units(found, stay=3)
        assert len(order) == len(set(order)) == 5
        for done in range(5):
            left = [unit for unit in range(8) if unit not in order[:done]]
            costs = {unit: error(found, [*order[:done], unit], DAMPING) for unit in left}
            assert costs[order[done]] <= min(costs.values()) * (1 + 1e-9)


def test_second_order_removal_is_near_the_best_choice_and_better_than_energy() -> None:
    found = problem(9, 1, seed=3)
    best = min(error(found, list(one), DAMPING) for one in itertools.combinations(range(9), 4))
    errors = [error(found, rule.order_units(found, 5), DAMPING) for rule in (obs, energy)]
    assert errors[0] <= 1.2 * best
    assert errors[0] < errors[1]


def test_energy_is_the_mean_square_of_what_a_unit_adds() -> None:
    torch.manual_seed(1)
    inputs, weight, size = torch.randn(50, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64), 3
    added = [
        float((inputs[:, at : at + size] @ weight[:, at : at + size].T).square().sum()) for at in range(0, 12, size)
    ]
    order = energy.order_units(UnitProblem(inputs.T @ inputs, weight, size), stay=1)
    assert order == sorted(range(4), key=added.__getitem__)[:3]


def test_many_units_go_a_few_at_a_time() -> None:
    found = problem(300, 1)
    assert len(set(obs.order_units(found, stay=101))) == 199


def test_wide_units_are_solved_on_several_threads() -> None:
    threads = torch.get_num_threads()
    found = problem(4, 192)
    try:
        torch.set_num_threads(2)  # with which LU of several such matrices at once is wrong on some CPUs
        (first,) = obs.order_units(found, stay=3)
    finally:
        torch.set_num_threads(threads)
    costs = [error(found, [unit], DAMPING) for unit in range(4)]
    assert costs[first] == min(costs)
