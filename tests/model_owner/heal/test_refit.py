"""Refit against an oracle that solves the same least squares from a whole transformers model's activations."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts import edit_weights, hidden_states, packed
from offsite.config import PackSpec, RefitMap
from offsite.errors import DataError, IncompatibleError, UsageError
from offsite.kernels.runtime import Runtime
from offsite.model_owner.base_model import open_base
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock, captured_inputs, captured_routing
from offsite.model_owner.calibration.calibration_batches import calibration_batches
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.held_solution import SHARES
from offsite.model_owner.heal.measured_response import measure_response
from offsite.model_owner.heal.refit import solve_block
from offsite.model_owner.heal.ridge import USUAL_RIDGE
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.families.family import RefitWay
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import open_checkpoint, write_checkpoint
from offsite.storage.safetensors_files import copied, read_float32
from tiny import FAMILIES, KINDS, Family, each_form, tiny_base, tiny_parties

CPU = torch.device("cpu")
BLOCKS = 8
KEPT = (1, 3, 6)  # what uniform selection keeps of the middle 1..6


def pack_refitted(base: Path, tmp_path: Path, text: Path, tokens: int, **settings: object) -> Path:
    options = {"keep": 3, "heal": "refit", "calibration": text, "calibration_tokens": tokens, "compute": "fp32"}
    return packed(base, tmp_path / "bundle", tiny_parties(tmp_path), **{**options, **settings}).folder


def linear_kinds() -> list[str]:
    return kinds_refitted("in closed form", "mlp")


def kinds_refitted(way: RefitWay, part: RefitMap) -> list[str]:
    """The kinds whose row says that refit finds this part in this way."""
    return [kind for kind, form in KINDS.items() if ARCHITECTURES[form["family"]].refit_way(part, form) == way]


@pytest.mark.parametrize("kind", each_form(linear_kinds()))
def test_solved_weights_are_the_ridge_solution_on_the_emulators_own_activations(
    kind: str, tmp_path: Path, text: Path
) -> None:
    base = tiny_base(tmp_path / "base", blocks=BLOCKS, **KINDS[kind])
    family = ARCHITECTURES[KINDS[kind]["family"]]
    (ids,) = calibration_batches(open_base(Base(base)), text, 8 * 64)  # one batch, so the ridge is the usual one
    bundle = pack_refitted(base, tmp_path, text, 8 * 64)
    targets = hidden_states(base, ids)
    own = open_checkpoint(base).tensors
    emulator = load_model(bundle, dtype=torch.float32, device=CPU)
    for place, (kept, following) in enumerate(zip(KEPT, (*KEPT[1:], 7), strict=True), start=1):
        linear = emulator.get_submodule(family.in_block(place, family.mlp_out))
        solved = linear.weight.detach().clone() if family.transposed else linear.weight.detach().T.clone()  # (F, H)
        old = torch.from_numpy(read_float32(own[family.in_block(kept, f"{family.mlp_out}.weight")]))
        old = old if family.transposed else old.T
        features, after = run_to(emulator, family.in_block(place, ""), family.mlp_out, ids)
        biased = f"{family.mlp_out}.bias" in {path for name in own if (path := name.partition(f".{kept}.")[2])}
        if biased:
            old_bias = torch.from_numpy(read_float32(own[family.in_block(kept, f"{family.mlp_out}.bias")]))
            old = torch.cat([old, old_bias[None]])
            solved = torch.cat([solved, linear.bias.detach()[None]])
            features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        target = targets[following].flatten(0, 1)
        before = after - features @ solved + features @ old  # what the old weights would have given
        root = target.norm(dim=1, keepdim=True).rsqrt().double()
        left, right = features.double() * root, (target - before).double() * root
        penalty = USUAL_RIDGE * left.square().sum(0).mean()
        stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
        change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], right.shape[1])])).solution
        assert change.abs().max() > 1e-3  # there was something to heal
        torch.testing.assert_close(solved, (old.double() + change).float(), atol=2e-4, rtol=2e-3)


def run_to(model: torch.nn.Module, block: str, linear: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters a linear map of a block and what leaves the block, tokens in rows."""
    seen: dict[str, torch.Tensor] = {}
    module = model.get_submodule(block.rstrip("."))
    hooks = [
        module.get_submodule(linear).register_forward_pre_hook(lambda _, a: seen.update(features=a[0].flatten(0, -2))),
        module.register_forward_hook(
            lambda _, __, out: seen.update(after=(out[0] if isinstance(out, tuple) else out).flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen["features"], seen["after"]


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_brings_the_emulator_closer_to_the_base_on_text_it_has_not_seen(
    family: Family, tmp_path: Path, text: Path
) -> None:
    base = tiny_base(tmp_path / "base", family, BLOCKS)
    healed = pack_refitted(base, tmp_path, text, 16 * 8 * 64)
    plain = packed(base, tmp_path / "plain", tiny_parties(tmp_path / "others"), keep=3).folder
    ids = torch.tensor([[1, *range(60, 120)], [1, *range(30, 90)]])
    target = hidden_states(base, ids)[7]
    error = {folder: float((hidden_states(folder, ids)[4] - target).square().mean()) for folder in (healed, plain)}
    assert error[healed] < 0.9 * error[plain]


class OneBlock:
    """A block of a tiny base that is to do the work of the one behind it too, on one batch of calibration text."""

    def __init__(self, base: Path, text: Path) -> None:
        self.model = open_base(Base(base))
        self.batches = calibration_batches(self.model, text, 8 * 64)  # one batch, so the ridge is the usual one
        runner = BlockRunner(self.model, Runtime(CPU, torch.float32))
        self.load = partial(runner.load, 1)
        self.enters = self.run(runner.load(0), [runner.load(0).embed(ids) for ids in self.batches])
        self.targets = self.run(runner.load(2), self.run(self.load(), self.enters))

    def run(self, block: LoadedBlock, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [block(ids, state) for ids, state in zip(self.batches, hidden, strict=True)]

    def refitted(self, *maps: RefitMap) -> dict[str, torch.Tensor]:
        return dict(solve_block(self.problem(), {}, PackSpec(refit_maps=maps), None))

    def problem(self, **changed: Any) -> BlockProblem:
        """The problem of this block, with some of its fields changed."""
        model = self.model
        paths = model.block(1).keys()
        problem = BlockProblem(self.load, model.family, model.config, self.batches, self.enters, self.targets, paths)
        return replace(problem, **changed)

    def error(self, changed: Mapping[str, torch.Tensor], load: Callable[..., LoadedBlock] | None = None) -> float:
        """Of the block's output, each token by 1 / norm of its target."""
        (after,), (target,) = self.run((load or self.load)(changed), self.enters), self.targets
        return float(((after - target).square().sum(-1) / target.norm(dim=-1)).sum())


@pytest.mark.parametrize("kind", each_form(kinds_refitted("in closed form", "attention")))
def test_attentions_projection_is_the_ridge_solution_with_the_mlps_output_held(
    kind: str, tmp_path: Path, text: Path
) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    family, block = one.model.family, one.load()
    with captured_inputs(block, [family.attention_out]) as seen:
        after = block(one.batches[0], one.enters[0])
    linear = block.module.get_submodule(family.attention_out)
    features, target = seen[family.attention_out].flatten(0, 1).detach(), one.targets[0].flatten(0, 1)
    if linear.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    root = target.norm(dim=1, keepdim=True).rsqrt().double()
    left, right = features.double() * root, (target - after.flatten(0, 1)).double() * root
    penalty = USUAL_RIDGE * left.square().sum(0).mean()
    stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], right.shape[1])])).solution
    assert change.abs().max() > 1e-3  # there was something to heal
    found = one.refitted("attention")
    inputs = linear.weight.shape[0 if family.transposed else 1]
    old = linear.weight if family.transposed else linear.weight.T  # (A, H)
    solved = found[f"{family.attention_out}.weight"]
    solved = solved if family.transposed else solved.T
    torch.testing.assert_close(solved, (old.double() + change[:inputs]).float(), atol=2e-4, rtol=2e-3)
    if linear.bias is not None:
        expected = (linear.bias.double() + change[inputs]).float()
        torch.testing.assert_close(found[f"{family.attention_out}.bias"], expected, atol=2e-4, rtol=2e-3)
    assert found.keys() <= {f"{family.attention_out}.weight", f"{family.attention_out}.bias"}
    assert one.error(found) < one.error({})


PARALLEL = ["stablelm, parallel, biases", "phi", "gptj", "gpt_neox", "falcon, one key head", "falcon, new decoder"]


@pytest.mark.parametrize("kind", PARALLEL)
def test_every_turn_brings_a_block_of_parallel_branches_closer(kind: str, tmp_path: Path, text: Path) -> None:
    """There nothing that one map gives enters the other, so no turn can undo what one before it won."""
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    turns: tuple[RefitMap, ...] = ("attention", "mlp", "attention", "mlp")
    errors = [one.error(one.refitted(*turns[:count]) if count else {}) for count in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 5
    assert one.error(one.refitted("mlp", "attention")) < one.error(one.refitted("mlp"))


@pytest.mark.parametrize("kind", ["llama tied, grouped", "gpt2 tied", "qwen3", "gemma", "bloom"])
def test_the_mlp_is_solved_on_what_the_new_attention_gives(kind: str, tmp_path: Path, text: Path) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    attention, both = one.refitted("attention"), one.refitted("attention", "mlp")
    assert one.error(both) < one.error(attention)
    assert all(torch.equal(both[name], value) for name, value in attention.items())


def test_a_dropped_block_that_does_nothing_leaves_nothing_to_heal(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", BLOCKS)
    idle = {ARCHITECTURES["llama"].in_block(i, p) for i in range(1, 7) if i not in KEPT for p in
            ("self_attn.o_proj.weight", "mlp.down_proj.weight")}  # fmt: skip
    tensors = [
        replace(copied(t), chunks=lambda t=t: [bytes(t.size)]) if t.name in idle else copied(t)
        for t in open_checkpoint(base).tensors.values()
    ]
    (tmp_path / "idle").mkdir()
    write_checkpoint(tmp_path / "idle", tensors)
    for file in base.iterdir():
        if file.suffix == ".json":
            (tmp_path / "idle" / file.name).write_bytes(file.read_bytes())
    bundle = pack_refitted(tmp_path / "idle", tmp_path, text, 8 * 64)
    held, own = open_checkpoint(bundle).tensors, open_checkpoint(base).tensors
    for place, kept in enumerate(KEPT, start=1):
        solved = read_float32(held[f"model.layers.{place}.mlp.down_proj.weight"])
        old = read_float32(own[f"model.layers.{kept}.mlp.down_proj.weight"])
        assert abs(solved - old).max() < 1e-5


@pytest.mark.parametrize(
    ("maps", "paths"),
    [
        ("mlp", ["mlp.down_proj"]),
        ("attention", ["self_attn.o_proj"]),
        ("attention,mlp,attention", ["mlp.down_proj", "self_attn.o_proj"]),
    ],
)
def test_only_the_named_projections_of_kept_blocks_differ_from_the_base(
    tmp_path: Path, text: Path, maps: str, paths: list[str]
) -> None:
    base = tiny_base(tmp_path / "base", "llama", BLOCKS)
    bundle = pack_refitted(base, tmp_path, text, 8 * 64, refit_maps=maps)
    assert changed_tensors(base, bundle) == {f"model.layers.{n}.{path}.weight" for n in (1, 2, 3) for path in paths}


def changed_tensors(base: Path, bundle: Path) -> set[str]:
    """Names in the bundle of what is not as in the base."""
    held, own = open_checkpoint(bundle).tensors, open_checkpoint(base).tensors
    kept = (0, *KEPT, 7)
    return {
        name
        for name, tensor in held.items()
        if not (read_float32(tensor) == read_float32(own[renumbered(name, kept)])).all()
    }


def renumbered(name: str, kept: tuple[int, ...]) -> str:
    place = ARCHITECTURES["llama"].block_of(name)
    return ARCHITECTURES["llama"].in_block(kept[place[0]], place[1]) if place else name


BEHIND: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {}),
    ("gemma3", {}),
    ("opt, projections, norms behind", {}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]
NORMS = {  # (family, part): the norms after it, in order
    ("gemma2", "mlp"): ["post_feedforward_layernorm"],
    ("gemma2", "attention"): ["post_attention_layernorm"],
    ("gemma3_text", "mlp"): ["post_feedforward_layernorm"],
    ("gemma3_text", "attention"): ["post_attention_layernorm"],
    ("opt", "mlp"): ["final_layer_norm"],
    ("opt", "attention"): ["self_attn_layer_norm", "final_layer_norm"],
    ("bloom", "attention"): ["post_attention_layernorm"],
}


@pytest.mark.parametrize(("kind", "config"), BEHIND)
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_in_front_of_a_norm_the_ridge_solution_holds_its_statistics(
    kind: str, config: dict[str, Any], part: RefitMap, tmp_path: Path, text: Path
) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind], **config), text)
    family, block = one.model.family, one.load()
    norms = NORMS.get((family.model_type, part), [])
    path, _ = family.output_of(part)
    with captured_inputs(block, [path, *norms]) as seen:
        after = block(one.batches[0], one.enters[0]).flatten(0, 1)
    linear, target = block.module.get_submodule(path), one.targets[0].flatten(0, 1)
    features, gain = seen[path].flatten(0, -2).detach().double(), torch.ones(32, dtype=torch.float64)
    if linear.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    for norm in norms:
        x, module = seen[norm].flatten(0, -2).double(), block.module.get_submodule(norm)
        gemma = "gemma" in family.model_type
        deviation = x.square().mean(-1, keepdim=True).sqrt() if gemma else x.std(-1, keepdim=True, correction=0)
        features, gain = features / deviation, gain * (module.weight.double() + gemma)
    root = target.norm(dim=1, keepdim=True).rsqrt().double()
    left, right = features * root, (target - after).double() * root
    penalty = USUAL_RIDGE * left.square().sum(0).mean()
    stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], right.shape[1])])).solution / gain
    found = one.refitted(part)
    inputs = linear.weight.shape[1]
    assert change.abs().max() > 1e-3  # there was something to heal
    assert one.error(found) < one.error({})

    def moved(share: float) -> dict[str, torch.Tensor]:
        weight = {f"{path}.weight": (linear.weight.double() + share * change[:inputs].T).float()}
        bias = {} if linear.bias is None else {f"{path}.bias": (linear.bias.double() + share * change[inputs]).float()}
        return {name: value.detach() for name, value in (weight | bias).items()}

    shares = SHARES if norms else (1.0,)
    best = min(shares, key=lambda share: one.error(moved(share)))
    torch.testing.assert_close(found[f"{path}.weight"], moved(best)[f"{path}.weight"], atol=1e-3, rtol=1e-2)


def test_a_mixture_of_experts_is_refitted_by_its_attention(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", "mixtral", BLOCKS)
    bundle = pack_refitted(base, tmp_path, text, 8 * 64, refit_maps="attention")
    ids = torch.tensor([[1, *range(60, 120)], [1, *range(30, 90)]])
    plain = packed(base, tmp_path / "plain", tiny_parties(tmp_path / "others"), keep=3).folder
    target = hidden_states(base, ids)[7]
    healed, dropped = (float((hidden_states(one, ids)[4] - target).square().mean()) for one in (bundle, plain))
    assert healed < dropped


def test_too_little_calibration_text_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(DataError, match="tokens, expected at least 63"):
        pack_refitted(tiny_base(tmp_path / "base", "llama", BLOCKS), tmp_path, short, 8 * 64)


def test_calibration_rows_may_be_jsonl(tmp_path: Path) -> None:
    base = open_base(Base(tiny_base(tmp_path / "base")))
    rows = [{"text": "a b c " * 40}, {"prompt": "d e f " * 40, "completion": "g h " * 40}]
    file, plain = tmp_path / "rows.jsonl", tmp_path / "plain.txt"
    file.write_text("\n".join(map(json.dumps, rows)))
    plain.write_text("a b c " * 40 + "\n\n" + "d e f " * 40 + "g h " * 40)
    assert torch.equal(calibration_batches(base, file, 256)[0], calibration_batches(base, plain, 256)[0])
    file.write_text('{"text": "fine"}\n{"other": 1}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        calibration_batches(base, file, 256)


def test_every_calibration_sequence_starts_with_one_bos(tmp_path: Path, text: Path) -> None:
    base = open_base(Base(tiny_base(tmp_path / "base")))
    (ids,) = calibration_batches(base, text, 4 * 64)
    assert ids.shape == (4, 64)
    assert (ids[:, 0] == base.config["bos_token_id"]).all()
    assert not (ids[:, 1:] == base.config["bos_token_id"]).any()


@pytest.mark.parametrize("settings", [{"keep": 2}, {"keep": 2, "heal": "affine"}, {"keep": None, "heal": "none"}])
def test_an_overflow_in_a_block_is_reported_with_its_number(
    tmp_path: Path, text: Path, settings: dict[str, object]
) -> None:
    base = tiny_base(tmp_path / "base", blocks=5)
    edit_weights(base / "model.safetensors", lambda held: held["model.layers.2.mlp.up_proj.weight"].fill(3e38))
    with pytest.raises(IncompatibleError, match=r"to solve for block [123]"):
        pack_refitted(base, tmp_path, text, 8 * 64, **settings)
    assert not (tmp_path / "bundle").exists()


def test_a_map_into_which_nothing_goes_stays_as_it_is(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", blocks=4)
    edit_weights(base / "model.safetensors", lambda held: held["model.layers.1.mlp.up_proj.weight"].fill(0))
    bundle = pack_refitted(base, tmp_path, text, 8 * 64, keep=1)
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (read_float32(open_checkpoint(folder).tensors[name]) for folder in (base, bundle))
    assert np.array_equal(after, before)


@pytest.mark.parametrize("kind", each_form(kinds_refitted("expert by expert", "mlp")))
def test_the_experts_are_ridge_solutions_one_after_the_other(kind: str, tmp_path: Path, text: Path) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    family, found = one.model.family, one.refitted("mlp")
    experts, block = family.experts, one.load()
    assert experts is not None
    if experts.module not in dict(block.module.named_modules()):
        assert found.keys() == {f"{family.mlp_out}.down_proj.weight"}
        assert one.error(found) < one.error({})
        return
    others = {name: value for name, value in found.items() if not name.startswith(experts.path)}
    block = one.load(others)  # what all tokens use is solved before
    with captured_routing(block, experts.module) as seen:
        after = block(one.batches[0], one.enters[0]).flatten(0, 1)
    ((hidden, chosen, weights),) = seen
    target, module = one.targets[0].flatten(0, 1), block.module.get_submodule(experts.module)
    error = (target - after).double()
    for expert in range(4):
        tokens, places = torch.where(chosen == expert)
        gate, up = (hidden[tokens] @ module.gate_up_proj[expert].T).detach().chunk(2, dim=1)
        features = (torch.nn.functional.silu(gate) * up * weights[tokens, places, None]).double()
        root = target[tokens].norm(dim=1, keepdim=True).rsqrt().double()
        left, right = features * root, error[tokens] * root
        penalty = USUAL_RIDGE * left.square().sum(0).mean()
        stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
        change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], 32)])).solution  # (F, H)
        assert len(tokens)
        assert change.abs().max() > 1e-3  # there was something to heal
        expected = (module.down_proj[expert].detach().double() + change.T).float()
        solved = found[f"{experts.path}.{expert}.{experts.out}.weight"]
        torch.testing.assert_close(solved, expected, atol=2e-4, rtol=2e-3)
        error[tokens] -= features @ change
    assert one.error(found) < one.error(others) <= one.error({})


def test_an_expert_that_all_tokens_use_is_solved_with_its_gate(tmp_path: Path, text: Path) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", "qwen2_moe", 4), text)
    block, path = one.load(), "mlp.shared_expert.down_proj"
    with captured_inputs(block, [path, "mlp.shared_expert_gate"]) as seen:
        after = block(one.batches[0], one.enters[0]).flatten(0, 1)
    gate = torch.sigmoid(block.module.get_submodule("mlp.shared_expert_gate")(seen["mlp.shared_expert_gate"])).detach()
    target, features = one.targets[0].flatten(0, 1), (seen[path] * gate).detach().double()
    root = target.norm(dim=1, keepdim=True).rsqrt().double()
    left, right = features * root, (target - after).double() * root
    penalty = USUAL_RIDGE * left.square().sum(0).mean()
    stacked = torch.cat([left, penalty.sqrt() * torch.eye(left.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(left.shape[1], 32)])).solution
    expected = block.module.get_submodule(path).weight.detach().double() + change.T
    torch.testing.assert_close(one.refitted("mlp")[f"{path}.weight"], expected.float(), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("kind", each_form(KINDS))
def test_a_block_that_gives_what_is_asked_of_it_stays_as_it_is(kind: str, tmp_path: Path, text: Path) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    one.targets = one.run(one.load(), one.enters)
    found, block = one.refitted("mlp", "attention"), one.model.block(1)
    assert found
    for path, value in found.items():
        np.testing.assert_allclose(value.numpy(), read_float32(block[path]), atol=1e-5)


DENSE = [kind for kind in KINDS if "moe" not in kind and kind != "mixtral"]
UNKNOWN: dict[str, Any] = {"linear_residual": False, "linear_attention": None, "mlp_norms": {}, "attention_norms": {}}


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_what_no_row_says_is_measured(kind: str, tmp_path: Path, text: Path) -> None:
    """The response of a block to the MLP's output, also through norms: the solution is that of the row."""
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    unknown = replace(one.model.family, **UNKNOWN)
    assert unknown.refit_way("mlp", one.model.config) == "as measured"
    found = dict(solve_block(one.problem(family=unknown), {}, PackSpec(refit_maps="mlp"), None))
    for path, value in one.refitted("mlp").items():
        torch.testing.assert_close(found[path], value, atol=2e-3, rtol=2e-2)
    assert one.error(found) < one.error({})


class ScaledMlp(torch.nn.Module):
    """An MLP whose output is multiplied by a number for each channel and one for all, as in Granite and with scales."""

    def __init__(self, mlp: torch.nn.Module, *, square: bool = False) -> None:
        super().__init__()
        self.down_proj, self.mlp, self.square = mlp.down_proj, [mlp], square

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.mlp[0](hidden)
        return made * made.abs() if self.square else 0.22 * made * torch.linspace(0.5, 1.5, made.shape[-1])


@pytest.mark.parametrize("square", [False, True])
def test_scales_are_measured_and_what_is_not_linear_follows_the_gradient(
    square: bool, tmp_path: Path, text: Path
) -> None:
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4), text)

    def load(changed: Mapping[str, torch.Tensor]) -> LoadedBlock:
        block = partial(one.load)(changed)
        block.module.mlp = ScaledMlp(block.module.mlp, square=square)
        return block

    problem = one.problem(family=replace(one.model.family, **UNKNOWN), load=load)
    response = measure_response(load({}), "mlp.down_proj", one.batches[0], one.enters[0])
    assert response.known is not square
    before = one.error({}, load)
    found = dict(solve_block(problem, {}, PackSpec(refit_maps="mlp"), None))
    assert one.error(found, load) < before
    if not square:
        scale = response.scale
        assert scale is not None
        torch.testing.assert_close(scale, 0.22 * torch.linspace(0.5, 1.5, 32), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", each_form(DENSE))
def test_the_gradient_leads_at_least_as_far_as_the_closed_form(kind: str, tmp_path: Path, text: Path) -> None:
    """Where nobody knows what follows attention: the first step is the closed form if the block is linear in it."""
    one = OneBlock(tiny_base(tmp_path / "base", blocks=4, **KINDS[kind]), text)
    unknown = replace(one.model.family, **UNKNOWN)
    assert unknown.refit_way("attention", one.model.config) == "by gradient"
    found = dict(solve_block(one.problem(family=unknown), {}, PackSpec(refit_maps=("attention",)), None))
    assert one.error(found) < one.error({})
    if one.model.family.refit_way("attention", one.model.config) == "in closed form":
        assert one.error(found) <= one.error(one.refitted("attention")) * 1.01


def test_fewer_tokens_than_one_sequence_has(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", blocks=4, max_position_embeddings=2048)
    with pytest.raises(UsageError, match="256 tokens of calibration text are asked for") as caught:
        pack_refitted(base, tmp_path, text, 256, keep=1)
    assert "calibration_tokens" in (caught.value.next_step or "")
