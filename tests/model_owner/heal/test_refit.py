"""Refit against an oracle that solves the same least squares from a whole transformers model's activations."""

import json
from collections.abc import Sequence
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
from offsite.model_owner.block_runner import BlockRunner, LoadedBlock, captured_inputs
from offsite.model_owner.calibration import calibration_batches
from offsite.model_owner.heal.block_step_protocol import BlockProblem
from offsite.model_owner.heal.refit import solve_block
from offsite.model_owner.heal.ridge import USUAL_RIDGE
from offsite.models.architectures import ARCHITECTURES
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
    return [kind for kind, form in KINDS.items() if ARCHITECTURES[form["family"]].residual_is_linear(form)]


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
        self.enters = self._run(runner.load(0), [runner.load(0).embed(ids) for ids in self.batches])
        self.targets = self._run(runner.load(2), self._run(self.load(), self.enters))

    def _run(self, block: LoadedBlock, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [block(ids, state) for ids, state in zip(self.batches, hidden, strict=True)]

    def refitted(self, *maps: RefitMap) -> dict[str, torch.Tensor]:
        problem = BlockProblem(self.load, self.model.family, self.model.config, self.batches, self.enters, self.targets)
        return dict(solve_block(problem, {}, PackSpec(refit_maps=maps), None))

    def error(self, changed: dict[str, torch.Tensor]) -> float:
        """Of the block's output, each token by 1 / norm of its target."""
        (after,), (target,) = self._run(self.load(changed), self.enters), self.targets
        return float(((after - target).square().sum(-1) / target.norm(dim=-1)).sum())


def kinds_linear_in_attention() -> list[str]:
    rows = {kind: ARCHITECTURES[form["family"]] for kind, form in KINDS.items()}
    return [kind for kind, row in rows.items() if row.residual_is_linear(KINDS[kind], "attention")]


@pytest.mark.parametrize("kind", each_form(kinds_linear_in_attention()))
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


NOT_LINEAR = {
    "gemma2": "a norm follows the MLP",
    "gemma3": "a norm follows the MLP",
    "opt, projections, norms behind": "a norm follows the MLP",
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen2_moe, dense blocks, windows": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "qwen3_moe tied, every second block dense": "a mixture of experts",
}


@pytest.mark.parametrize(("kind", "why"), NOT_LINEAR.items())
def test_a_family_whose_residual_is_not_linear_is_refused(tmp_path: Path, text: Path, kind: str, why: str) -> None:
    assert set(KINDS) == {*NOT_LINEAR, *linear_kinds()}
    base = tiny_base(tmp_path / "base", blocks=BLOCKS, **KINDS[kind])
    with pytest.raises(IncompatibleError, match=rf"linear in the MLP's output(.|\n)*{why}(.|\n)*--heal none") as caught:
        pack_refitted(base, tmp_path, text, 8 * 64)
    assert ('refit_maps = "attention"' in caught.value.next_step) is ("experts" in why)
    assert not (tmp_path / "bundle").exists()


NOT_LINEAR_IN_ATTENTION: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {}, "--heal none"),
    ("gemma3", {}, "--heal none"),
    ("opt, projections, norms behind", {}, "--heal none"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, 'refit_maps = "mlp"'),
]


@pytest.mark.parametrize(("kind", "config", "instead"), NOT_LINEAR_IN_ATTENTION)
def test_a_norm_behind_the_attention_is_refused(
    tmp_path: Path, text: Path, kind: str, config: dict[str, Any], instead: str
) -> None:
    base = tiny_base(tmp_path / "base", blocks=BLOCKS, **KINDS[kind], **config)
    with pytest.raises(IncompatibleError, match="refit_maps names attention") as caught:
        pack_refitted(base, tmp_path, text, 8 * 64, refit_maps="attention")
    assert instead in caught.value.next_step
    assert not (tmp_path / "bundle").exists()


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
def test_weights_that_are_no_numbers_are_told_with_the_block(
    tmp_path: Path, text: Path, settings: dict[str, object]
) -> None:
    base = tiny_base(tmp_path / "base", blocks=5)
    edit_weights(base / "model.safetensors", lambda held: held["model.layers.2.mlp.up_proj.weight"].fill(np.inf))
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


def test_a_mixture_is_told_all_that_the_default_has_to_be_given(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", "mixtral", 4)
    with pytest.raises(IncompatibleError) as caught:
        pack_refitted(base, tmp_path, text, 8 * 64, keep=None)
    assert "--keep" in (caught.value.next_step or "")
    assert "--prune-by magnitude" in (caught.value.next_step or "")


def test_fewer_tokens_than_one_sequence_has(tmp_path: Path, text: Path) -> None:
    base = tiny_base(tmp_path / "base", blocks=4, max_position_embeddings=2048)
    with pytest.raises(UsageError, match="256 tokens of calibration text are asked for") as caught:
        pack_refitted(base, tmp_path, text, 256, keep=1)
    assert "calibration_tokens" in (caught.value.next_step or "")
