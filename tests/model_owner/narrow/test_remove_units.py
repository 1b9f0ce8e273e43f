"""Narrower blocks: they compute what the base's block computes without those heads and neurons, made up for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import packed
from offsite.config.emulator_methods import UNIT_RULES
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import BaseModel, open_base
from offsite.model_owner.block_runner import BlockRunner, captured_inputs
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.ridge import USUAL_RIDGE
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.narrow.even_widths import base_widths
from offsite.model_owner.narrow.remove_units import narrowed_tensors, remove_units
from offsite.models.block_widths import Kept, obstacles, tensor_places
from offsite.models.loading import load_model
from offsite.models.torch_tensors import read_tensor
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint
from offsite.storage.safetensors_files import read_chunks, read_float32
from tiny import KINDS, MakeBase, Parties, each_form

CPU = torch.device("cpu")
EXACT = Runtime(CPU, torch.float32)
DENSE = [kind for kind, form in KINDS.items() if "mix" not in form["family"] and "moe" not in form["family"]]


def assert_same_tensors(folder: Path, other: Path) -> None:
    """Two checkpoints have the same tensors, bit for bit."""
    ours, theirs = (open_checkpoint(one).tensors for one in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert b"".join(read_chunks(ours[name])) == b"".join(read_chunks(tensor)), name


class OneBlock:
    """Block 1 of a tiny base, with its inputs on one batch of calibration text."""

    def __init__(self, base: Path, batches: Sequence[torch.Tensor] | None = None) -> None:
        self.model: BaseModel = open_base(Base(base))
        self.runner = BlockRunner(self.model, EXACT)
        self.batches = batches or calibration_batches(self.model, None, 8 * 64)  # one, so the ridge is the usual one
        first = self.runner.load(0)
        self.enters = [first(ids, first.embed(ids)) for ids in self.batches]
        self.base = base_widths(self.model, 1)
        self.tensors = {
            path: read_tensor(tensor, torch.float32) for path, tensor in self.model.block(1).items()
        }  # as files have them
        self.family = self.model.family

    def problem(self) -> BlockProblem:
        targets = [self.output({}, position) for position in range(len(self.batches))]
        load = self.runner.load
        return BlockProblem(
            lambda replaced: load(1, replaced),
            self.family,
            self.model.config,
            self.batches,
            self.enters,
            targets,
            self.tensors.keys(),
        )

    def output(self, replaced: dict[str, torch.Tensor], position: int = 0) -> torch.Tensor:
        return self.runner.load(1, replaced)(self.batches[position], self.enters[position])

    def half(self) -> Kept:
        """Every second unit of heads and of neurons, where they can be removed."""
        whole, everything = obstacles(self.family, self.model.config, self.tensors), Kept.all_of(self.base)
        return Kept(
            everything.units if "heads" in whole else everything.units[1::2],
            everything.neurons if "neurons" in whole else everything.neurons[1::2],
        )

    def zeroed(self, kept: Kept) -> dict[str, torch.Tensor]:
        """The output projections with zeros in the columns of what is removed."""
        found = {}
        for linear in (self.family.attention_out, self.family.mlp_out):
            path, axis = f"{linear}.weight", 0 if self.family.transposed else 1
            stay = tensor_places(self.family, path, self.tensors[path].shape, self.base, kept)[axis]
            value = torch.zeros_like(self.tensors[path])
            if stay is None:
                value = self.tensors[path]
            else:
                value.index_copy_(axis, torch.tensor(stay), self.tensors[path].index_select(axis, torch.tensor(stay)))
            found[path] = value
        return found


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_a_narrower_block_is_the_base_s_block_without_those_heads_and_neurons(base_of: MakeBase, kind: str) -> None:
    block = OneBlock(base_of(blocks=4, **KINDS[kind]))
    kept = block.half()
    narrow = narrowed_tensors(block.family, block.tensors, block.base, kept)
    assert narrow
    torch.testing.assert_close(block.output(narrow), block.output(block.zeroed(kept)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(block.output(narrow), block.output({}), atol=1e-3)


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_what_stays_makes_up_for_what_is_removed_as_least_squares_do(base_of: MakeBase, kind: str) -> None:
    """The MLP alone: its output projection is the ridge regression of what the whole one gave."""
    block = OneBlock(base_of(blocks=4, **KINDS[kind]))
    half = block.base.narrowed(block.base.units, block.base.neurons // 2)
    found, kept = remove_units(block.problem(), UNIT_RULES["energy"], block.base, half)
    assert len(kept.neurons) == half.neurons
    assert kept.units == tuple(range(block.base.units))
    out, family = block.family.mlp_out, block.family
    loaded = block.runner.load(1)
    with captured_inputs(loaded, [out]) as seen:
        after = loaded(block.batches[0], block.enters[0]).flatten(0, 1)
    inputs = seen[out].flatten(0, -2).double()  # (N, F)
    weight = block.tensors[f"{out}.weight"].double()
    weight = weight if family.transposed else weight.T  # (F, H)
    given = after if family.refit_way("mlp", block.model.config) == "in closed form" else inputs @ weight
    size = given.double().norm(dim=1, keepdim=True)
    gone = torch.tensor([one for one in range(block.base.neurons) if one not in kept.neurons])
    stay = inputs[:, list(kept.neurons)]
    if f"{out}.bias" in block.tensors:
        stay = torch.cat([stay, torch.ones(len(stay), 1)], dim=1)
    left, right = stay / size, inputs[:, gone] @ weight[gone] / size
    penalty = USUAL_RIDGE * left.square().sum(0).mean()
    stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], right.shape[1])])).solution
    solved = found[f"{out}.weight"] if family.transposed else found[f"{out}.weight"].T
    expected = weight[list(kept.neurons)] + change[: half.neurons]
    torch.testing.assert_close(solved.double(), expected, atol=2e-4, rtol=2e-3)
    residual = [float((left @ one - right).square().sum()) for one in (change, torch.zeros_like(change))]
    assert residual[0] < 0.95 * residual[1]


@pytest.mark.parametrize("rule", [name for name, rule in UNIT_RULES.items() if not rule.by_loss])
@pytest.mark.parametrize("kind", each_form(DENSE))
def test_making_up_brings_the_block_nearer_to_the_base(base_of: MakeBase, kind: str, rule: str) -> None:
    block = OneBlock(base_of(blocks=4, **KINDS[kind]))
    target, half = block.output({}), block.half()
    widths = block.base.narrowed(len(half.units), len(half.neurons))
    found, kept = remove_units(block.problem(), UNIT_RULES[rule], block.base, widths)
    plain = narrowed_tensors(block.family, block.tensors, block.base, kept)
    scale = target.norm(dim=-1, keepdim=True)
    error = [float(((block.output(one) - target) / scale).square().mean()) for one in (dict(found), plain)]
    assert error[0] < error[1]


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_everything_kept_is_the_base_bit_for_bit(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, narrow=1.0)
    assert not bundle.manifest.requires
    assert_same_tensors(bundle.folder, base)


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_the_ledger_s_map_leads_to_a_base_that_computes_the_same(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    """What the bundle's narrower layers hold, put where the map says, in a base whose other columns are zero."""
    base = base_of(blocks=4, **KINDS[kind])
    share = 0.75 if "alibi" in kind or kind == "bloom" else 0.6
    settings = {"placement": "every", "calibration_tokens": 512, "compute": "fp32"}
    bundle = packed(base, tmp_path / "bundle", parties, narrow=share, **settings)
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.carry is not None
    family, held = bundle.manifest.family, open_checkpoint(bundle.folder).tensors
    whole = load_model(base, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        for place in (1, 2):
            layers = issued.carry.blocks[place].narrowed
            assert family.mlp_out in layers
            for path, kept in layers.items():
                layer: Any = whole.get_submodule(family.in_block(place, path))
                stored = torch.from_numpy(read_float32(held[family.in_block(place, f"{path}.weight")]))
                matrix, own = (stored.T, layer.weight.T) if family.transposed else (stored, layer.weight)
                if kept.outputs is None:  # an output projection, of which columns went
                    own.zero_()
                    own[:, list(kept.inputs or ())] = matrix
                    if layer.bias is not None:
                        layer.bias.copy_(torch.from_numpy(read_float32(held[family.in_block(place, f"{path}.bias")])))
                else:
                    assert kept.inputs is None
                    torch.testing.assert_close(own[list(kept.outputs)], matrix, atol=0, rtol=0)
        narrow = load_model(bundle.folder, dtype=torch.float32, device=CPU)
        ids = torch.arange(3, 43).reshape(2, 20)
        torch.testing.assert_close(
            narrow(ids, use_cache=False).logits, whole(ids, use_cache=False).logits, atol=1e-4, rtol=1e-3
        )
