"""Statistics of the loss: those of autograd through the whole base, stored once; and units chosen by them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from offsite.config import PackSpec
from offsite.model_owner.base_model import open_base
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.narrow import gradot, obs
from offsite.model_owner.narrow.loss_statistics import LossStatistics, loss_statistics
from offsite.model_owner.narrow.projection_inputs import ProjectionInputs
from offsite.model_owner.narrow.unit_rule_protocol import UnitProblem
from offsite.models.loading import load_model
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from tiny import MakeBase, Parties

SPEC = PackSpec(narrow=0.6, narrow_by="fisher", calibration_tokens=512, compute="fp32", device="cpu")


def statistics_by_autograd(
    base: Path, batches: list[torch.Tensor], path: str
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The metrics of all blocks, and the gradients of their output projections, from one backward pass."""
    model: Any = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    family, blocks, seen = open_base(Base(base)).family, model.get_submodule(path), {}
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    weights = []
    for index, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, __, output, index=index: seen.update({index: output[0] if isinstance(output, tuple) else output})
        )
        outputs = {part: block.get_submodule(family.output_of(part)[0]) for part in ("attention", "mlp")}
        weights.append({part: layer.weight.requires_grad_() for part, layer in outputs.items()})
    totals: list[torch.Tensor] = [torch.zeros(()) for _ in blocks]
    tokens = sum(ids.numel() for ids in batches)
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[index] for index in range(len(blocks))], retain_graph=True)
        loss.backward()
        for index, gradient in enumerate(gradients):
            scaled = (gradient * seen[index].detach().norm(dim=-1, keepdim=True)).flatten(0, 1)
            totals[index] = totals[index] + scaled.T @ scaled
    turned = [
        {part: (weight.grad.T if family.transposed else weight.grad) / tokens for part, weight in one.items()}
        for one in weights
    ]
    return [total / tokens for total in totals], turned


@pytest.mark.parametrize(("family", "path"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_statistics_are_those_of_one_backward_pass(base_of: MakeBase, tmp_path: Path, family: str, path: str) -> None:
    base = base_of(family, 4)
    torch.manual_seed(0)
    batches = [torch.randint(5, 60, (3, 24)) for _ in range(2)]
    found = loss_statistics(open_base(Base(base)), (1, 2, 3), SPEC, tmp_path, silent, batches=batches)
    wanted, weights = statistics_by_autograd(base, batches, path)
    assert sorted(found) == [1, 2, 3]
    for index, one in found.items():  # hidden states wait in bfloat16
        near(one.metric, wanted[index])
        for part, gradient in one.gradients.items():
            near(gradient, weights[index][part])
    assert [file.name for file in tmp_path.iterdir()] == ["loss-statistics.safetensors"]
    again = loss_statistics(open_base(Base(base)), (2,), SPEC, tmp_path, silent)  # read, not computed
    assert torch.equal(again[2].metric, found[2].metric)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


def problem_of(weight: torch.Tensor, gram: torch.Tensor, loss: LossStatistics) -> UnitProblem:
    return ProjectionInputs("mlp", weight.double(), None, None, gram, torch.zeros_like(gram)).problem(1, loss)


def test_units_that_the_loss_does_not_see_go_first() -> None:
    """Four neurons of equal energy write to one direction each; the loss depends on two of these directions."""
    metric = torch.diag(torch.tensor([1.0, 0.01, 1.0, 0.02]))
    problem = problem_of(torch.eye(4), torch.eye(4), LossStatistics(metric, {"mlp": torch.zeros(4, 4)}))
    assert obs.order_units(problem, 1)[:2] == [1, 3]


def test_gradot_keeps_gradients_and_removes_what_the_emulator_needs() -> None:
    torch.manual_seed(0)
    weight, inputs, outputs = torch.randn(5, 6), torch.randn(40, 6), torch.randn(30, 5)
    gram, metric = inputs.T @ inputs, outputs.T @ outputs
    changes = [  # |H d|_1 by the whole Kronecker product, d = -w_u
        float((torch.kron(metric, gram) @ one.flatten()).abs().sum())
        for one in (-weight * (torch.arange(6) == unit) for unit in range(6))
    ]
    still = problem_of(weight, gram, LossStatistics(metric, {"mlp": torch.zeros(5, 6)}))
    order = gradot.order_units(still, 1)
    assert order == sorted(range(6), key=changes.__getitem__)[:5]
    needed = torch.zeros(5, 6)
    needed[:, order[1]] = -1000 * weight[:, order[1]]  # the loss grows when this unit goes, so it goes first
    assert gradot.order_units(problem_of(weight, gram, LossStatistics(metric, {"mlp": needed})), 4) == order[1::-1]


@pytest.mark.parametrize("rule", ["fisher", "gradot"])
@pytest.mark.parametrize("widths", ["even", "budget"])
def test_a_bundle_narrowed_by_the_loss(
    base_of: MakeBase, tmp_path: Path, parties: Parties, rule: str, widths: str
) -> None:
    base = base_of("llama", 4)
    settings = {"placement": "every", "bottom": None, "top": None, "keep": None, "narrow_widths": widths}
    spec = {"narrow": 0.6, "calibration_tokens": 512, **settings}
    bundles = {one: packed(base, tmp_path / one, parties, narrow_by=one, **spec) for one in (rule, "obs")}
    records = {one: Ledger(parties.owner.ledger).issued(bundle.digest) for one, bundle in bundles.items()}
    carried = {one: record.carry for one, record in records.items() if record}
    assert carried[rule] != carried["obs"]
    assert not list(tmp_path.glob("**/enters-*"))


def test_experts_are_not_scored_by_gradients() -> None:
    with pytest.raises(ValueError, match="choose narrow_by = obs or fisher or energy, or leave narrow_experts out"):
        PackSpec(narrow_experts=0.5, narrow_by="gradot")
