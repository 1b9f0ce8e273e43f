"""One budget of multiply-adds over all blocks: the total holds, and blocks that matter less lose more."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts import edit_weights, packed
from offsite.config import PackSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.narrow import energy, obs
from offsite.model_owner.narrow.budget_widths import Errors, base_multiply_adds, budget_widths, convex
from offsite.model_owner.narrow.choose_widths import choose_widths
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes, even_widths
from offsite.model_owner.narrow.removal_errors import added_errors, removal_errors
from offsite.model_owner.narrow.unit_rule_protocol import DAMPING, UnitProblem
from offsite.model_owner.plan import plan_pack
from offsite.model_owner.select import search
from offsite.models.block_widths import Widths, multiply_adds, narrowed_shapes, obstacles
from offsite.models.modules.declared import unwrapped
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import read_chunks
from tiny import KINDS, MakeBase, Parties, each_form, tiny_base

DENSE = [kind for kind, form in KINDS.items() if "mix" not in form["family"] and "moe" not in form["family"]]
BLOCKS = (1, 2, 3)


def spec(**settings: Any) -> PackSpec:
    usual = {"narrow": 0.6, "narrow_widths": "budget", "calibration_tokens": 512, "compute": "fp32", "device": "cpu"}
    return PackSpec.model_validate({**usual, **settings})


def cost(model: BaseModel, index: int, widths: Widths) -> int:
    shapes, base = block_shapes(model, index), base_widths(model, index)
    return multiply_adds(model.family, narrowed_shapes(model.family, shapes, base, widths), base.chosen)


def made_up(model: BaseModel, factors: Sequence[float], seed: int = 0) -> Errors:
    """Convex errors of each block, times the block's factor."""
    drawn = np.random.default_rng(seed)
    base = base_widths(model, 1)
    counts = {"attention": base.units - 1, "mlp": base.neurons - 1}
    return {
        index: {part: sorted(factor * drawn.random(count)) for part, count in counts.items()}  # type: ignore[misc]
        for index, factor in zip(BLOCKS, factors, strict=True)
    }


def quieten(base: Path, block: int) -> None:
    """Make a block of a tiny Llama add next to nothing: its output projections shrink by a factor of a thousand."""

    def change(tensors: dict[str, Any]) -> None:
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{block}.{path}.weight"] *= 1e-3

    edit_weights(base / WEIGHTS, change)


@pytest.mark.parametrize("share", [0.55, 0.75, 0.9])
@pytest.mark.parametrize("kind", each_form(DENSE))
def test_the_total_holds_within_one_unit(base_of: MakeBase, kind: str, share: float) -> None:
    model = open_base(Base(base_of(blocks=5, **KINDS[kind])))
    settings = spec(narrow=share)
    errors = removal_errors(model, BLOCKS, settings, silent)
    whole = obstacles(model.family, model.config, block_shapes(model, 1))
    assert all(("attention" in errors[index]) is ("heads" not in whole) for index in BLOCKS)
    assert all(("mlp" in errors[index]) is ("neurons" not in whole) for index in BLOCKS)
    found = budget_widths(model, BLOCKS, errors, settings)
    left = sum(cost(model, index, widths) for index, widths in zip(BLOCKS, found, strict=True))
    base = base_widths(model, 1)
    unit = max(
        cost(model, 1, base) - cost(model, 1, narrower)
        for narrower in (base.narrowed(base.units - 1, base.neurons), base.narrowed(base.units, base.neurons - 1))
    )
    budget = share * base_multiply_adds(model, BLOCKS)
    assert budget - unit < left <= budget
    for widths in found:
        assert widths.units == base.units or "heads" not in whole
        assert widths.neurons == base.neurons or "neurons" not in whole
        assert min(widths.units, widths.neurons) >= 1


def test_of_a_mixture_heads_alone_go(base_of: MakeBase) -> None:
    model = open_base(Base(base_of(blocks=5, **{**KINDS["mixtral"], "kv_heads": 4})))
    settings = spec(narrow=0.9)
    found = budget_widths(model, BLOCKS, removal_errors(model, BLOCKS, settings, silent), settings)
    base, budget = base_widths(model, 1), 0.9 * base_multiply_adds(model, BLOCKS)
    left = sum(cost(model, index, widths) for index, widths in zip(BLOCKS, found, strict=True))
    assert budget - (cost(model, 1, base) - cost(model, 1, base.narrowed(base.units - 1, 0))) < left <= budget
    assert all((one.experts, one.neurons) == (base.experts, 0) for one in found)


def test_no_other_widths_of_that_cost_have_a_smaller_error(base_of: MakeBase) -> None:
    """Against all combinations of a model with few units."""
    model = open_base(Base(base_of("llama", 5, kv_heads=4)))
    base = base_widths(model, 1)
    errors = made_up(model, (1.0, 0.3, 2.0), seed=3)
    found = budget_widths(model, BLOCKS, errors, spec(narrow=0.7))

    def error(index: int, units: int, neurons: int) -> float:
        one = errors[index]
        return sum(one["attention"][: base.units - units]) + sum(one["mlp"][: base.neurons - neurons])

    total = sum(error(index, one.units, one.neurons) for index, one in zip(BLOCKS, found, strict=True))
    room = sum(cost(model, index, one) for index, one in zip(BLOCKS, found, strict=True))
    least = {}  # cost -> the least error of two blocks
    options = [(units, neurons) for units in range(1, 5) for neurons in range(6, base.neurons + 1)]
    costs = {one: cost(model, 1, base.narrowed(*one)) for one in options}
    for one, other in itertools.product(options, repeat=2):
        spent, lost = costs[one] + costs[other], error(1, *one) + error(2, *other)
        least[spent] = min(least.get(spent, np.inf), lost)
    best = min(
        lost + error(3, *third) for third in options for spent, lost in least.items() if spent + costs[third] <= room
    )
    assert total == pytest.approx(best, rel=1e-9)


def test_a_block_that_matters_less_loses_more(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", 5, kv_heads=4)
    quieten(base, 2)
    model = open_base(Base(base))
    found = budget_widths(model, BLOCKS, removal_errors(model, BLOCKS, spec(), silent), spec())
    costs = [cost(model, index, widths) for index, widths in zip(BLOCKS, found, strict=True)]
    assert costs[1] < 0.5 * min(costs[0], costs[2])
    (even, *_) = even_widths(model, BLOCKS, spec())
    assert costs[1] < cost(model, 2, even) < min(costs[0], costs[2])


def test_no_part_gets_narrower_than_the_floor_while_the_budget_can_be_met(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("llama", 5, kv_heads=4)))
    base, errors = base_widths(model, 1), made_up(model, (0.0, 1.0, 1.0))
    (emptied, *others) = budget_widths(model, BLOCKS, errors, spec(narrow=0.7))
    assert (emptied.units, emptied.neurons) == (1, base.neurons // 8)
    assert all(one.neurons > base.neurons // 2 for one in others)
    narrowest = budget_widths(model, BLOCKS, errors, spec(narrow=0.13))
    assert min(one.neurons for one in narrowest) < base.neurons // 8
    left = sum(cost(model, index, one) for index, one in zip(BLOCKS, narrowest, strict=True))
    assert left <= 0.13 * base_multiply_adds(model, BLOCKS)


def test_descending_errors_share_their_mean() -> None:
    assert convex([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert convex([5.0, 1.0, 4.0]) == [3.0, 3.0, 4.0]
    assert convex([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert convex([]) == []


@pytest.mark.parametrize(("rule", "by_loss"), [(obs, False), (energy, False), (obs, True)], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_added_errors_are_those_of_least_squares(rule: Any, by_loss: bool, size: int) -> None:
    """Against least squares on rows of inputs, with a row for the damping of each input."""
    torch.manual_seed(size)
    inputs = torch.randn(60, 6 * size, dtype=torch.float64) @ torch.randn(6 * size, 6 * size, dtype=torch.float64)
    weight = torch.randn(7, 6 * size, dtype=torch.float64)
    outputs = torch.randn(20, 7, dtype=torch.float64)
    metric = outputs.T @ outputs if by_loss else None
    problem = UnitProblem(inputs.T @ inputs, weight, size, metric)
    counts = torch.eye(7, dtype=torch.float64) if metric is None else metric
    if by_loss:
        counts = counts + DAMPING * counts.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    order = rule.order_units(problem, 1)
    added = added_errors(problem, order)
    penalty = DAMPING * problem.gram.diagonal().mean()
    rows = torch.cat([inputs, penalty.sqrt() * torch.eye(6 * size, dtype=torch.float64)])
    for count in range(1, 6):
        gone = [unit * size + one for unit in order[:count] for one in range(size)]
        stay = [column for column in range(6 * size) if column not in gone]
        lost = rows[:, gone] @ weight[:, gone].T
        solution = torch.linalg.lstsq(rows[:, stay], lost).solution
        left = lost - rows[:, stay] @ solution
        expected = float(torch.trace(left @ counts @ left.T))
        assert sum(added[:count]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_errors_are_relative_to_the_hidden_state(tmp_path: Path, kind: str) -> None:
    """A block that adds nothing has errors of next to nothing, also where a norm follows its projections."""
    base = tiny_base(tmp_path / "base", blocks=5, **KINDS.get(kind, {"family": kind}))

    def change(tensors: dict[str, Any]) -> None:
        for name, values in tensors.items():
            scaled = ("post_attention_layernorm", "post_feedforward_layernorm") if kind == "gemma2" else ("o_", "down_")
            if name.startswith("model.layers.2.") and any(part in name for part in scaled):
                values[:] = -1 + 1e-3 if kind == "gemma2" else 1e-3 * values  # Gemma's scale is 1 + weight

    edit_weights(base / WEIGHTS, change)
    model = open_base(Base(base))
    errors = removal_errors(model, BLOCKS, spec(), silent)
    for part in ("attention", "mlp"):
        assert sum(errors[2][part]) < 1e-2 * min(sum(errors[1][part]), sum(errors[3][part]))  # type: ignore[index]


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_a_bundle_with_uneven_widths(base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str) -> None:
    """Packed with every family: what the config declares is within the budget, and the bundle opens."""
    base = base_of(blocks=5, **KINDS[kind])
    settings = {"narrow": 0.75, "narrow_widths": "budget", "calibration_tokens": 512, "compute": "fp32"}
    bundle = packed(base, tmp_path / "bundle", parties, **settings)
    declared = unwrapped(json.loads((bundle.folder / "config.json").read_text()))[1]
    assert declared is not None
    model = open_base(Base(base))
    left = sum(
        cost(model, index, declared.widths(base_widths(model, index), place)) for place, index in enumerate(BLOCKS)
    )
    assert left <= 0.75 * base_multiply_adds(model, BLOCKS)


def test_everything_kept_is_the_base_bit_for_bit(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base = base_of("llama", 4)
    bundle = packed(base, tmp_path / "bundle", parties, narrow=1.0, narrow_widths="budget")
    assert not bundle.manifest.requires
    ours, theirs = (open_checkpoint(folder).tensors for folder in (bundle.folder, base))
    assert all(b"".join(read_chunks(ours[name])) == b"".join(read_chunks(one)) for name, one in theirs.items())


def test_chosen_widths_are_stored_for_a_resumed_run(base_of: MakeBase, tmp_path: Path) -> None:
    model = open_base(Base(base_of("llama", 5)))
    first = choose_widths(model, BLOCKS, spec(), tmp_path, silent)
    stored = tmp_path / "widths.json"
    assert json.loads(stored.read_text()) == [[one.units, one.neurons] for one in first]
    base = base_widths(model, 1)
    stored.write_text(json.dumps([[1, 3], [base.units, 4], [1, 5]]))
    assert choose_widths(model, BLOCKS, spec(), tmp_path, silent) == (
        base.narrowed(1, 3),
        base.narrowed(base.units, 4),
        base.narrowed(1, 5),
    )


def test_activations_that_are_not_finite_are_explained(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", 5)

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][:] = np.inf

    edit_weights(base / WEIGHTS, change)
    with pytest.raises(IncompatibleError, match="no equations to solve for block 1"):
        removal_errors(open_base(Base(base)), BLOCKS, spec(), silent)


def test_a_plan_states_the_total_and_runs_nothing(
    base_of: MakeBase, tmp_path: Path, parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(base_of("llama", 5))
    model = open_base(base)

    def runs(*_: object, **__: object) -> None:
        raise RuntimeError("the network runs")

    monkeypatch.setattr("offsite.model_owner.narrow.removal_errors.removal_errors", runs)
    with pytest.raises(RuntimeError, match="the network runs"):
        choose_widths(model, BLOCKS, spec(), tmp_path, silent)
    plan, _ = plan_pack(base, tmp_path / "out", "hospital", spec(bottom=1, top=1), parties.owner)
    whole = base_multiply_adds(model, BLOCKS)
    assert plan.widths is not None
    assert f"at most {int(0.6 * whole):,} of the blocks' {whole:,} multiply-adds" in plan.widths
    assert plan.work[:2] == ("choose widths by budget", "narrow by obs")
    even, _ = plan_pack(base, tmp_path / "out", "hospital", spec(bottom=1, top=1, narrow_widths="even"), parties.owner)
    assert even.widths is None
    assert even.files == plan.files


def test_a_search_scores_candidates_with_widths_by_budget(
    base_of: MakeBase, tmp_path: Path, parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = base_of("llama", 5), []

    def watched(model: BaseModel, emulator: Sequence[int], errors: Errors, asked: PackSpec) -> tuple[Widths, ...]:
        seen.append((tuple(emulator), sorted(errors)))
        return budget_widths(model, emulator, errors, asked)

    monkeypatch.setattr(search, "budget_widths", watched)
    settings = {"narrow": 0.6, "narrow_widths": "budget", "calibration_tokens": 2048, "compute": "fp32"}
    packed(base, tmp_path / "bundle", parties, keep=2, select="search", search_minutes=0.02, **settings)
    assert seen
    assert all(len(emulator) == 2 and measured == [1, 2, 3] for emulator, measured in seen)


@pytest.mark.parametrize("shares", [("narrow_heads",), ("narrow_heads", "narrow_neurons"), ("narrow_experts",)])
def test_a_budget_without_a_total_is_refused(shares: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"total of narrow, and {' and '.join(shares)} set"):
        PackSpec.model_validate({"narrow_widths": "budget", **dict.fromkeys(shares, 0.5)})
