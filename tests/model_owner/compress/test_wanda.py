"""Wanda against its definition in plain loops, and in bundles: every output loses its share of weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from artifacts import hidden_states, packed
from offsite.config import PackSpec, load_spec
from offsite.config.emulator_methods import PRUNERS
from offsite.errors import UsageError
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner, captured_routing
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.compress.calibrated_pruning import prune_layers
from offsite.model_owner.compress.pruner_protocol import pruning
from offsite.model_owner.compress.smallest_weights import where_kept
from offsite.model_owner.compress.wanda import from_gram, prune_matrices, sum_inputs
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base, Bundle
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_float32
from tiny import EVERY_VISION_KIND, FAMILIES, Parties, tiny_pictures, tiny_vision_base

MakeBase = Callable[..., Path]
CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"prune_by": "wanda", "calibration_tokens": 1024, "compute": "fp32", "threads": 1}


def by_definition(weight: Tensor, inputs: Tensor, share: float) -> Tensor:
    """Sun et al., equation 1 and algorithm 1, a weight at a time; weight (outputs, I), inputs (N, I)."""
    pruned = weight.clone()
    for output in range(weight.shape[0]):
        scores = []
        for column in range(weight.shape[1]):
            norm = sum(float(x) ** 2 for x in inputs[:, column]) ** 0.5
            scores.append((abs(float(weight[output, column])) * norm, column))
        for _, column in sorted(scores)[: int(share * weight.shape[1])]:
            pruned[output, column] = 0
    return pruned


@pytest.mark.parametrize("share", [0.0, 0.5, 0.3, 0.99])
def test_what_goes_is_what_the_definition_says(share: float) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 17), torch.randn(40, 17) * torch.rand(17) * 5
    (found,) = prune_matrices({"layer": weight}, sum_inputs(inputs), share).values()
    assert torch.equal(found, by_definition(weight, inputs, share))
    assert (found == 0).sum(1).tolist() == [int(share * 17)] * 6


def test_sums_of_batches_add_up_to_those_of_all_and_to_a_gram_matrix() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 17)
    added = sum_inputs(inputs[:15]) + sum_inputs(inputs[15:])
    torch.testing.assert_close(added, inputs.norm(dim=0) ** 2)
    torch.testing.assert_close(from_gram(inputs.T @ inputs), added)


def test_of_equal_scores_the_earlier_go() -> None:
    (found,) = prune_matrices({"layer": torch.ones(2, 6)}, torch.ones(6), 0.5).values()
    assert found.tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_a_small_weight_on_a_large_input_stays() -> None:
    weight = torch.tensor([[0.1, 1.0]])
    (found,) = prune_matrices({"layer": weight}, torch.tensor([400.0, 1.0]), 0.5).values()
    assert torch.equal(found, torch.tensor([[0.1, 0.0]]))


def inputs_of(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """What enters some linear layers of a model, all tokens one below the other, by the layers' names."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, arguments: seen[name].append(arguments[0].flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        for ids in batches:
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bundle_is_pruned_block_by_block_on_the_emulators_own_activations(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    base = base_of(family, 4)
    bundle = packed(base, tmp_path / "bundle", parties, prune=0.5, **SETTINGS)
    family, held = ARCHITECTURES[bundle.manifest.architecture], open_checkpoint(bundle.folder).tensors
    model = load_model(base, dtype=torch.float32, device=CPU)  # becomes the emulator, a block at a time
    batches = calibration_batches(open_base(Base(base)), None, 1024)
    for place in (1, 2):
        seen = inputs_of(model, [family.in_block(place, path) for path in family.linears], batches)
        for path in family.linears:
            weight = model.get_submodule(family.in_block(place, path)).weight
            with torch.no_grad():
                matrix = weight.T if family.transposed else weight
                scores = matrix.abs() * seen[family.in_block(place, path)].norm(dim=0)
                border = scores.sort(dim=1).values[:, matrix.shape[1] // 2 - 1 : matrix.shape[1] // 2 + 1].mean(1)
                kept = scores > border[:, None]
                weight.copy_((matrix * kept).T if family.transposed else matrix * kept)
            stored = torch.from_numpy(read_float32(held[family.in_block(place, f"{path}.weight")]))
            assert torch.equal(stored, weight), path


def zeros_of_outputs(bundle: Bundle) -> dict[str, set[int]]:
    """Of every linear layer of the emulator: how many zeros its outputs have."""
    family, tensors = ARCHITECTURES[bundle.manifest.architecture], open_checkpoint(bundle.folder).tensors
    found = {}
    for index in range(bundle.manifest.split.bottom, bundle.manifest.split.bottom + bundle.manifest.split.emulator):
        for name in (family.in_block(index, f"{path}.weight") for path in family.linears):
            if name in tensors:
                gone = read_float32(tensors[name]) == 0
                found[name] = set(gone.sum(0 if family.transposed else 1).tolist())
    return found


def share_of_outputs(bundle: Bundle, share: float) -> dict[str, set[int]]:
    family, tensors = ARCHITECTURES[bundle.manifest.architecture], open_checkpoint(bundle.folder).tensors
    return {
        name: {int(share * tensors[name].shape[0 if family.transposed else 1])} for name in zeros_of_outputs(bundle)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_with_refit_every_output_loses_its_share_and_the_emulator_comes_closer_to_the_base(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    base, share = base_of(family, 5), 0.45
    settings = {**SETTINGS, "calibration_tokens": 4096, "prune": share}
    refitted, plain = (packed(base, tmp_path / heal, parties, heal=heal, **settings) for heal in ("refit", "none"))
    for bundle in (refitted, plain):
        assert zeros_of_outputs(bundle) == share_of_outputs(bundle, share)
    ids = torch.tensor([[1, *range(60, 120)], [1, *range(30, 90)]])
    target = hidden_states(base, ids)[4]
    error = [float((hidden_states(one.folder, ids)[4] - target).square().mean()) for one in (refitted, plain)]
    assert error[0] < error[1]


@pytest.mark.parametrize("maps", ["attention", "attention,mlp", "mlp,attention,mlp"])
def test_whatever_refit_solves_ends_pruned(base_of: MakeBase, tmp_path: Path, parties: Parties, maps: str) -> None:
    bundle = packed(base_of("gpt2", 4), tmp_path / "out", parties, prune=0.5, heal="refit", refit_maps=maps, **SETTINGS)
    assert zeros_of_outputs(bundle) == share_of_outputs(bundle, 0.5)


def test_zeros_left_out_are_loaded_as_zeros(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    stored, left_out = (
        packed(base_of("llama", 4), tmp_path / zeros, parties, prune=0.5, zeros=zeros, **SETTINGS)
        for zeros in ("stored", "left-out")
    )
    one, other = (load_model(bundle.folder, dtype=torch.float32, device=CPU) for bundle in (stored, left_out))
    parameters = dict(other.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in one.named_parameters())


def test_a_narrower_feed_forward_part_has_the_share_too(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base_of("llama", 4), tmp_path / "out", parties, prune=0.5, mlp_width=0.5, **SETTINGS)
    held = open_checkpoint(bundle.folder).tensors
    down = read_float32(held["model.layers.1.mlp.down_proj.weight"])
    assert ((down == 0).sum(1) >= down.shape[1] // 2).all()


def test_distillation_leaves_the_zeros(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    settings = {**SETTINGS, "prune": 0.5, "distill_tokens": 1024, "distill_steps": 2}
    base, steps = base_of("llama", 4), ("refit", "refit,distill")
    before, after = (packed(base, tmp_path / heal, parties, heal=heal, **settings) for heal in steps)
    held = [open_checkpoint(bundle.folder).tensors for bundle in (before, after)]
    for name in zeros_of_outputs(before):
        old, new = (read_float32(tensors[name]) for tensors in held)
        assert np.array_equal(old == 0, new == 0)
        assert not np.array_equal(old, new)


@pytest.mark.parametrize("kind", EVERY_VISION_KIND)
def test_encoders_are_pruned_on_pictures(tmp_path: Path, parties: Parties, kind: str) -> None:
    base, pictures = tiny_vision_base(tmp_path / "base", kind, 4), tiny_pictures(tmp_path / "own", 4)
    bundle = packed(base, tmp_path / "bundle", parties, prune=0.5, calibration=pictures, **SETTINGS)
    found = zeros_of_outputs(bundle)
    assert found
    assert found == share_of_outputs(bundle, 0.5)


def test_experts_are_pruned_on_the_tokens_that_go_to_them(base_of: MakeBase, text: Path) -> None:
    """Two of four experts get no token: they lose their smallest weights."""
    model = open_base(Base(base_of("mixtral", 3, num_experts_per_tok=1)))
    batches = calibration_batches(model, text, 16 * 64)
    runner = BlockRunner(model, Runtime(CPU, torch.float32))
    router = torch.from_numpy(read_float32(model.block(1)["block_sparse_moe.gate.weight"])).clone()
    router[1], router[2:] = -router[0], 0
    found = {"block_sparse_moe.gate.weight": router}
    states = [runner.load(0)(ids, runner.load(0).embed(ids)) for ids in batches]
    problem = BlockProblem(
        lambda changed: runner.load(1, changed), model.family, model.config, batches, states, states, model.block(1)
    )
    pruned = prune_layers(problem, found, pruning(PRUNERS["wanda"], 0.5), spared=())
    block = problem.load(found)
    rows: list[list[torch.Tensor]] = [[], [], [], []]
    for ids, state in zip(batches, states, strict=True):
        with captured_routing(block, "mlp.experts") as seen:
            block(ids, state)
        for expert in range(4):
            rows[expert].append(seen[0][0][(seen[0][1] == expert).any(1)])
    weights = {path: read_float32(tensor) for path, tensor in model.block(1).items()}
    for expert in range(4):
        start = f"block_sparse_moe.experts.{expert}"
        enters = torch.cat(rows[expert])
        gate, up = (enters @ torch.from_numpy(weights[f"{start}.{path}.weight"]).T for path in ("w1", "w3"))
        inner = torch.nn.functional.silu(gate) * up
        for path, inputs in (("w1", enters), ("w3", enters), ("w2", inner)):
            weight = weights[f"{start}.{path}.weight"]
            norms = inputs.norm(dim=0).numpy() if len(inputs) else np.ones(weight.shape[1], np.float32)
            kept = where_kept(weight * norms, 0.5, inputs_axis=1)
            np.testing.assert_array_equal(pruned[f"{start}.{path}.weight"].numpy(), np.where(kept, weight, 0))
    assert [bool(len(torch.cat(one))) for one in rows] == [True, True, False, False]


@pytest.mark.parametrize(("heal", "why"), [("share", "of a block differ"), ("affine", "its own pass")])
def test_what_does_not_go_with_a_pass_on_calibration_data_is_no_setting(heal: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"prune_by = wanda.*{why}.*choose prune_by = magnitude"):
        load_spec(PackSpec, {"keep": 2, "heal": heal, "prune": 0.5, "prune_by": "wanda"})
    assert load_spec(PackSpec, {"keep": 2, "heal": heal, "prune": 0.5}).pruner.name == "magnitude"
