"""Fewer experts in a mixture: the blocks are those that transformers builds for fewer experts, and the best stay."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from artifacts import packed
from model_owner.narrow.test_remove_units import CPU, OneBlock, assert_same_tensors
from offsite import Bundle, PackSpec, verify_bundle
from offsite.config.emulator_methods import UNIT_RULES
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import captured_routing
from offsite.model_owner.check_packing import require_packable
from offsite.model_owner.heal.block_by_block import block_by_block, read_solved
from offsite.model_owner.ledger import Issued, Ledger
from offsite.model_owner.narrow.even_widths import base_widths, block_shapes, even_widths
from offsite.model_owner.narrow.expert_problem import expert_problem
from offsite.model_owner.narrow.remove_units import narrowed_tensors, remove_units
from offsite.model_owner.plan import plan_pack
from offsite.model_owner.sandwich import Sandwich
from offsite.models.block_widths import Kept, multiply_adds, narrowed_shapes
from offsite.models.loading import load_model
from offsite.models.modules.declared import unwrapped
from offsite.progress import silent
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint
from tiny import KINDS, MakeBase, Parties, each_form

MIXTURES = [kind for kind, form in KINDS.items() if "mix" in form["family"] or "moe" in form["family"]]
UNIFORM = ["mixtral", "qwen2_moe", "qwen3_moe"]  # every block has experts
EVERY = {"placement": "every", "bottom": None, "top": None, "keep": None}
QUICK = {"calibration_tokens": 512, "compute": "fp32"}
IDS = torch.arange(3, 43).reshape(2, 20)


def issued(bundle: Bundle, parties: Parties) -> Issued:
    found = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert found is not None
    return found


def kept_experts(bundle: Bundle, parties: Parties) -> list[tuple[int, ...]]:
    """The experts that stay in each block, as the ledger's map has them; () for a block without experts."""
    carry = issued(bundle, parties).carry
    assert carry is not None
    router = {path for block in carry.blocks for path in block.narrowed if path.endswith(".gate")}
    assert len(router) == 1
    return [block.narrowed[path].outputs or () if (path := next(iter(router))) in block.narrowed else ()
            for block in carry.blocks]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", each_form(MIXTURES))
def test_all_experts_kept_is_the_base_bit_for_bit(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, narrow_experts=1.0)
    assert not bundle.manifest.requires
    assert_same_tensors(bundle.folder, base)


@pytest.mark.parametrize("kind", UNIFORM)
def test_the_bundle_is_the_model_that_transformers_builds_for_fewer_experts(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    """Cut by hand: the stacks and the router of transformers' own modules, at the experts that the ledger names."""
    base = base_of(blocks=3, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, narrow_experts=0.75, heal="none", **EVERY, **QUICK)
    kept = kept_experts(bundle, parties)
    assert [len(one) for one in kept] == [3, 3, 3]
    assert len(set(kept)) > 1
    whole = AutoModelForCausalLM.from_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    key = "num_experts" if kind == "qwen2_moe" else "num_local_experts"
    setattr(config, key, 3)
    cut = AutoModelForCausalLM.from_config(config).eval()
    weights = whole.state_dict()
    for name in weights:
        if ".mlp.experts." in name or name.endswith(".mlp.gate.weight"):
            weights[name] = weights[name][list(kept[int(name.split(".")[2])])]
    cut.load_state_dict(weights, strict=True)
    model = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    found = logits(model)
    torch.testing.assert_close(found, logits(cut), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, logits(whole.eval()), atol=1e-2)
    blocks: Any = model.get_submodule("model.layers")
    assert {one.num_experts for one in blocks.modules() if hasattr(one, "num_experts")} == {3}


@pytest.mark.parametrize("kind", each_form(MIXTURES))
def test_bundles_of_mixtures_verify_and_have_the_planned_size(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    """With dense blocks among them too, whatever the blocks that go out whole."""
    base = base_of(blocks=5, **KINDS[kind])
    whole = sum(tensor.size for tensor in open_checkpoint(base).tensors.values())
    for name, settings in {
        "middle": {"narrow_experts": 0.5, "heal": "refit", "bottom": 1, "top": 1},
        "every": {"narrow_experts": 0.75, "narrow_heads": 0.5, "placement": "every"},
        "distilled": {
            "narrow_experts": 0.5,
            "heal": "distill",
            "distill_steps": 2,
            "distill_tokens": 512,
            "bottom": 1,
            "top": 1,
        },
        "pruned": {"narrow_experts": 0.5, "prune": 0.5, "narrow_by": "energy", "bottom": 1, "top": 1},
    }.items():
        asked = {"bottom": None, "top": None, "keep": None, **QUICK, **settings}
        bundle = packed(base, tmp_path / name, parties, **asked)
        assert verify_bundle(bundle.folder, parties.data_owner) == bundle
        plan, _ = plan_pack(
            Base(base), tmp_path / "planned", "hospital", PackSpec.model_validate({"dtype": "fp32", **asked}),
            parties.owner,
        )  # fmt: skip
        files = {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
        assert {amount.name: amount.bytes for amount in plan.files} == files
        assert sum(tensor.size for tensor in open_checkpoint(bundle.folder).tensors.values()) < whole
        assert "experts" in bundle.manifest.requires
        family = bundle.manifest.family
        _, declared = unwrapped(json.loads((bundle.folder / "config.json").read_text()))
        assert declared is not None
        held = open_checkpoint(bundle.folder).tensors
        for place, count in enumerate(declared.experts or ()):
            names = [name for name in held if family.block_of(name) and "experts" in name]
            inside = {name for name in names if name.startswith(family.in_block(declared.first + place, ""))}
            assert len(inside) == count * 3


def test_the_bundle_does_not_tell_which_experts_were_kept(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base = base_of(blocks=2, family="mixtral", num_local_experts=16)
    bundle = packed(base, tmp_path / "bundle", parties, narrow_experts=0.5, **EVERY, **QUICK)
    for experts in kept_experts(bundle, parties):
        assert experts != tuple(range(8))
        listed = str(list(experts))[1:-1].replace(" ", "")
        for file in bundle.folder.iterdir():
            text = file.read_bytes().decode("latin-1").replace(" ", "").replace("\n", "")
            assert listed not in text


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_problem_is_that_of_what_each_expert_gives(base_of: MakeBase, kind: str) -> None:
    """Against the outputs of transformers' modules with the weights of all other experts at zero."""
    block = OneBlock(base_of(blocks=4, **KINDS[kind]))
    experts = block.family.experts
    assert experts is not None
    loaded = block.runner.load(1)
    module: Any = loaded.module.get_submodule(experts.module)
    with captured_routing(loaded, experts.module) as seen:
        after = loaded(block.batches[0], block.enters[0]).flatten(0, 1)
    ((hidden, chosen, weights),) = seen
    given = []
    for expert in range(4):
        gate, up = functional.linear(hidden, module.gate_up_proj[expert]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, module.down_proj[expert])
        share = torch.where(chosen == expert, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
        given.append((output * share / after.norm(dim=-1, keepdim=True)).detach().double())
    expected = torch.tensor([[float((one * other).sum()) for other in given] for one in given], dtype=torch.float64)
    problem = expert_problem(block.problem(), {}, experts)
    torch.testing.assert_close(problem.gram, expected, atol=1e-6, rtol=1e-4)
    assert (problem.units, problem.size, problem.weight.tolist()) == (4, 1, [[1.0] * 4])
    found, kept = remove_units(
        block.problem(), UNIT_RULES["energy"], block.base, block.base.narrowed(block.base.units, 0, 2)
    )
    assert set(kept.experts) == set(expected.diagonal().topk(2).indices.tolist())
    assert {name for name in found if "gate_proj" not in name and name.endswith("gate.weight")}


def test_heads_go_first_and_experts_are_chosen_behind_them(base_of: MakeBase) -> None:
    block = OneBlock(base_of(blocks=4, family="mixtral"))
    narrower = block.base.narrowed(1, 0, 2)
    found, kept = remove_units(block.problem(), UNIT_RULES["obs"], block.base, narrower)
    assert (len(kept.units), len(kept.experts)) == (1, 2)
    heads = block.base.narrowed(1, 0)
    alone, with_all = remove_units(block.problem(), UNIT_RULES["obs"], block.base, heads)
    assert with_all == Kept(kept.units, (), (0, 1, 2, 3))
    out = f"{block.family.attention_out}.weight"
    torch.testing.assert_close(found[out], alone[out], atol=0, rtol=0)
    cut = narrowed_tensors(block.family, block.tensors, block.base, Kept(with_all.units, (), kept.experts))
    assert cut.keys() == found.keys()
    torch.testing.assert_close(block.output(dict(found)), block.output(cut | {out: alone[out]}), atol=1e-6, rtol=1e-5)


def test_an_interrupted_run_finds_which_experts_stay(base_of: MakeBase, tmp_path: Path) -> None:
    model, sandwich = open_base(Base(base_of("mixtral", 4))), Sandwich.of(frozenset({0, 3}), 4)
    spec = PackSpec.model_validate({"narrow_experts": 0.5, "narrow_heads": 0.5, "heal": "none", **QUICK})
    widths = even_widths(model, (1, 2), spec)
    solved = block_by_block(model, sandwich, (1, 2), spec, tmp_path, silent, widths=widths)
    again = read_solved(model, (1, 2), tmp_path)
    assert again.kept == solved.kept
    assert again.tensors.keys() == solved.tensors.keys()
    assert [len(one.experts) for one in again.kept.values()] == [2, 2]


@pytest.mark.parametrize("kind", UNIFORM)
def test_refit_makes_up_for_removed_experts(base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    target = logits(load_model(base, dtype=torch.float32, device=CPU))
    errors = []
    for heal in ("none", "refit"):
        settings = {"narrow_experts": 0.5, "heal": heal, "calibration_tokens": 4096, "compute": "fp32"}
        bundle = packed(base, tmp_path / heal, parties, **settings)
        found = load_model(bundle.folder, dtype=torch.float32, device=CPU)
        ids = OneBlock(base).batches[0][:4]
        with torch.no_grad():
            whole, ours = (
                model(ids, use_cache=False).logits
                for model in (load_model(base, dtype=torch.float32, device=CPU), found)
            )
        errors.append(float((whole - ours).square().mean()))
        assert not torch.equal(logits(found), target)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", UNIFORM)
def test_fewer_experts_are_not_sent_and_save_no_arithmetic(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    model = open_base(Base(base))
    shapes, whole = block_shapes(model, 1), base_widths(model, 1)
    half = whole.narrowed(whole.units, 0, 2)
    fewer = narrowed_shapes(model.family, shapes, whole, half)
    assert multiply_adds(model.family, fewer, half.chosen) == multiply_adds(model.family, shapes, whole.chosen)
    bundle = packed(base, tmp_path / "bundle", parties, narrow_experts=0.5, heal="none", **QUICK)
    shares = issued(bundle, parties).shares
    assert shares is not None
    experts = [path for path in shapes if ".experts." in path]
    of_one = sum(math.prod(shapes[path]) for path in experts) // 4
    router = next(path for path in shapes if path.endswith("gate.weight") and path.count(".") == 2)
    assert shares.not_sent == 2 * (2 * of_one + math.prod(shapes[router]) // 2)  # two of four experts of two blocks
    assert shares.compressed == 0  # the others, and their rows of the router, are as in the base


def test_a_share_of_the_arithmetic_of_a_mixture_removes_heads(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("mixtral", 4)))
    (widths,) = even_widths(model, (1,), PackSpec(narrow=0.9))
    assert (widths.heads, widths.experts) == (2, 4)  # of 4 and 4: half of attention is an eighth of the arithmetic
    (widths,) = even_widths(model, (1,), PackSpec(narrow=0.99, keep=2))
    assert (widths.heads, widths.experts) == (2, 4)


@pytest.mark.parametrize(
    ("family", "settings", "says", "next_step"),
    [
        ("mixtral", {"narrow": 0.5}, "less than a block can be narrowed to", "--narrow-experts removes whole experts"),
        ("mixtral", {"narrow_neurons": 0.5}, "neurons of this mixtral model cannot be removed", "--narrow-experts"),
        ("mixtral", {"narrow_experts": 0.25}, "leaves too few experts", "choose --narrow-experts 0.5 or more"),
        ("mixtral", {"narrow_experts": 0.9}, "--narrow-experts would remove nothing", "choose a smaller share"),
        ("llama", {"narrow_experts": 0.5}, "experts of this llama model cannot be removed", "leave --narrow-experts"),
        ("mixtral", {"narrow_experts": 0.5, "bits": 8}, "cannot be compressed in this way", "pack without --bits"),
        ("mixtral", {"narrow_experts": 0.5, "heal": "affine"}, "compressed in this way", "pack with --heal refit"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    base_of: MakeBase, family: str, settings: dict[str, Any], says: str, next_step: str
) -> None:
    model = open_base(Base(base_of(family, 6)))
    with pytest.raises((IncompatibleError, UsageError), match=says) as caught:
        require_packable(model, PackSpec.model_validate(settings))
    assert next_step in (caught.value.next_step or "")


def test_an_emulator_without_experts_is_refused(base_of: MakeBase) -> None:
    model = open_base(Base(base_of("qwen2_moe", 6, mlp_only_layers=[1, 2, 3, 4])))
    with pytest.raises(UsageError, match="--narrow-experts would remove nothing"):
        require_packable(model, PackSpec(narrow_experts=0.5, bottom=1, top=1))


def test_experts_and_the_arithmetic_are_two_settings() -> None:
    with pytest.raises(ValueError, match="narrow sets by itself what stays: give it or narrow_experts"):
        PackSpec(narrow=0.5, narrow_experts=0.5)
