"""SparseGPT against a slow oracle, and in bundles: as many zeros as asked for, nearer to the base than otherwise."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from artifacts import hidden_states, packed
from offsite.config.emulator_methods import PRUNERS
from offsite.model_owner.block_runner import LoadedBlock
from offsite.model_owner.compress.calibrated_pruning import prune_layers
from offsite.model_owner.compress.pruner_protocol import pruning
from offsite.model_owner.compress.smallest_weights import without_smallest
from offsite.model_owner.compress.sparsegpt import COLUMNS, DAMPING, prune_matrices
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.models.families.architectures import ARCHITECTURES, Architecture
from offsite.models.families.timm_family import TIMM
from offsite.protocol.artifacts import Bundle
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from tiny import FAMILIES, KINDS, MakeBase, Parties, each_form, tiny_base

SHARE = 0.5


def problem(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A matrix, and the Gram matrix of inputs that depend on one another."""
    torch.manual_seed(0)
    seen = torch.randn(4 * inputs, inputs // 2) @ torch.randn(inputs // 2, inputs) + 0.1 * torch.randn(
        4 * inputs, inputs
    )
    return torch.randn(outputs, inputs), seen.T @ seen


def prune_matrix(weight: Tensor, gram: Tensor, share: float) -> Tensor:
    return prune_matrices({"layer": weight}, gram, share)["layer"]


def one_by_one(weight: Tensor, gram: Tensor, zeros: Tensor) -> Tensor:
    """Take numbers away in the order of the columns; those behind change so that the squared error is least."""
    system = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = weight.double().clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(system[column:, column:])
        for row in torch.nonzero(zeros[:, column]).flatten():
            left[row, column:] -= left[row, column] / inverse[0, 0] * inverse[0]
    return left.float()


@pytest.mark.parametrize("inputs", [24, COLUMNS + 40])
def test_what_stays_is_what_the_rule_gives(inputs: int) -> None:
    weight, gram = problem(6, inputs)
    found = prune_matrix(weight, gram, SHARE)
    assert int((found == 0).sum()) == int(SHARE * weight.numel())
    torch.testing.assert_close(found, one_by_one(weight, gram, found == 0), rtol=1e-3, atol=1e-3)


def test_products_change_less_than_without_the_smallest_numbers() -> None:
    weight, gram = problem(32, 64)
    smallest = weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values

    def error(other: Tensor) -> float:
        return float((((weight - other) @ gram) * (weight - other)).sum())

    assert error(prune_matrix(weight, gram, SHARE)) < 0.7 * error(weight.masked_fill(smallest, 0))


def test_inputs_that_are_never_there_go_first() -> None:
    weight, gram = problem(8, 16)
    gram[3] = gram[:, 3] = 0
    found = prune_matrix(weight, gram, 1 / 16)
    assert (found[:, 3] == 0).all()
    torch.testing.assert_close(found[:, :3], weight[:, :3])


@pytest.mark.parametrize(("family", "heal"), [*((family, "refit") for family in FAMILIES), ("gemma2", "none")])
def test_bundles_have_the_zeros_and_are_closer_to_the_base_than_by_magnitude(
    base_of: MakeBase, tmp_path: Path, parties: Parties, text: Path, family: str, heal: str
) -> None:
    base = base_of(family, 5)
    settings = {"keep": 3, "prune": SHARE, "calibration": text, "calibration_tokens": 8 * 8 * 64, "compute": "fp32"}
    ours = packed(base, tmp_path / "ours", parties, heal=heal, **settings)
    magnitude = packed(base, tmp_path / "magnitude", parties, heal="none", prune_by="magnitude", **settings)
    assert zeros(ours) == {name: int(SHARE * size) for name, size in pruned_sizes(ours).items()}
    ids = torch.tensor([[1, *range(60, 120)], [1, *range(30, 90)]])
    target = hidden_states(base, ids)[4]
    error = [float((hidden_states(one.folder, ids)[4] - target).square().mean()) for one in (ours, magnitude)]
    assert error[0] < error[1]


@pytest.mark.parametrize("maps", ["attention", "attention,mlp", "mlp,attention,mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_whatever_refit_solves_ends_pruned(
    base_of: MakeBase, tmp_path: Path, parties: Parties, text: Path, family: str, maps: str
) -> None:
    bundle = packed(
        base_of(family, 5), tmp_path / "out", parties,
        keep=3, heal="refit", refit_maps=maps, prune=SHARE, calibration=text, calibration_tokens=8 * 64,
    )  # fmt: skip
    assert zeros(bundle) == {name: int(SHARE * size) for name, size in pruned_sizes(bundle).items()}


def pruned_sizes(bundle: Bundle) -> dict[str, int]:
    """The matrices of the emulator's linear maps, and how many numbers each has."""
    family, tensors = ARCHITECTURES[bundle.manifest.architecture], open_checkpoint(bundle.folder).tensors
    places = {name: family.block_of(name) for name in tensors}
    emulator = range(bundle.manifest.split.bottom, bundle.manifest.split.bottom + bundle.manifest.split.emulator)
    return {
        name: math.prod(tensors[name].shape)
        for name, place in places.items()
        if place and place[0] in emulator and _is_pruned(family, place[1])
    }


def _is_pruned(family: Architecture, path: str) -> bool:
    linear = path.removesuffix(".weight")
    return linear in family.linears or (family.experts is not None and linear.startswith(f"{family.experts.path}."))


def zeros(bundle: Bundle) -> dict[str, int]:
    tensors = open_checkpoint(bundle.folder).tensors
    return {name: int((read_float32(tensors[name]) == 0).sum()) for name in pruned_sizes(bundle)}


def test_of_equal_numbers_the_earlier_go_and_no_more_than_so_many() -> None:
    weight, gram = torch.ones(4, 6), torch.eye(6)
    for count in (0, 1, 5, 23):
        left = prune_matrix(weight, gram, count / 24 + 1e-9)
        assert (left == 0).flatten().tolist() == [i < count for i in range(24)]


def test_distillation_leaves_the_zeros(base_of: MakeBase, tmp_path: Path, parties: Parties, text: Path) -> None:
    settings = {"keep": 2, "prune": SHARE, "calibration": text, "calibration_tokens": 8 * 64, "distill_steps": 3}
    bundles = [
        packed(base_of("llama", 5), tmp_path / heal, parties, heal=heal, **settings)
        for heal in ("refit", "refit,distill")
    ]
    assert zeros(bundles[0]) == zeros(bundles[1])
    before, after = (open_checkpoint(bundle.folder).tensors for bundle in bundles)
    for name in pruned_sizes(bundles[0]):
        old, new = read_float32(before[name]), read_float32(after[name])
        assert ((old == 0) == (new == 0)).all()
        assert (old != new).any()


def test_a_whole_middle_can_be_pruned(base_of: MakeBase, tmp_path: Path, parties: Parties, text: Path) -> None:
    bundle = packed(
        base_of("gpt2", 4), tmp_path / "out", parties,
        keep=2, heal="refit", prune=SHARE, calibration=text, calibration_tokens=8 * 64,
    )  # fmt: skip
    assert zeros(bundle) == {name: int(SHARE * size) for name, size in pruned_sizes(bundle).items()}


@pytest.mark.parametrize("kind", each_form([kind for kind in KINDS if "moe" in kind or kind == "mixtral"]))
@pytest.mark.parametrize("heal", ["none", "refit"])
def test_experts_lose_the_same_share_as_every_matrix(
    tmp_path: Path, parties: Parties, text: Path, kind: str, heal: str
) -> None:
    base = tiny_base(tmp_path / "base", blocks=5, **KINDS[kind])
    bundle = packed(
        base, tmp_path / "out", parties, keep=3, heal=heal, prune=SHARE, calibration=text, calibration_tokens=8 * 64
    )
    found = zeros(bundle)
    assert any("experts" in name for name in found)
    assert found == {name: int(SHARE * size) for name, size in pruned_sizes(bundle).items()}


class EvaAttention(nn.Module):
    """As timm's: the weight of the map is taken, and the map itself never called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = nn.functional.linear(hidden, self.qkv.weight).chunk(3, dim=-1)
        attended: Tensor = self.proj((queries * keys).softmax(-1) * values)
        return attended


class EvaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), EvaAttention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        after: Tensor = hidden + self.mlp["fc2"](self.mlp["fc1"](hidden).relu())
        return after


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, pixel_values: Tensor) -> None:
        self.block(pixel_values)


def eva_block() -> LoadedBlock:
    torch.manual_seed(0)
    block = EvaBlock()
    return LoadedBlock(block, Around(block), torch.float32, vision=True)


def pruned_layers(block: LoadedBlock, hidden: Tensor, config: dict[str, object]) -> Mapping[str, Tensor]:
    """All layers of a block but the one that ends the MLP."""
    problem = BlockProblem(lambda _: block, TIMM, config, [hidden], [hidden], [hidden], ())
    sparsegpt = pruning(PRUNERS["sparsegpt"], SHARE)
    return prune_layers(problem, {}, sparsegpt, spared={TIMM.mlp_out})


def test_a_map_whose_weight_alone_is_taken_is_pruned_on_what_enters_the_module_around_it() -> None:
    block, hidden = eva_block(), torch.randn(2, 5, 8)
    found = pruned_layers(block, hidden, {"separate": False, "whole_bias": False})
    assert found.keys() == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight"}  # of all that the family has
    with torch.no_grad():
        enters = block.module.norm1(hidden).flatten(0, 1)  # type: ignore[operator]
    expected = prune_matrix(block.module.attn.qkv.weight.detach(), enters.T @ enters, SHARE)  # type: ignore
    torch.testing.assert_close(found["attn.qkv.weight"], expected)


def test_a_map_that_is_never_called_loses_its_smallest_weights() -> None:
    block = eva_block()
    found = pruned_layers(block, torch.randn(2, 5, 8), {"separate": False, "whole_bias": True})
    weight = block.module.attn.qkv.weight.detach().numpy()  # type: ignore[union-attr,operator]
    np.testing.assert_array_equal(found["attn.qkv.weight"].numpy(), without_smallest(weight, SHARE))
