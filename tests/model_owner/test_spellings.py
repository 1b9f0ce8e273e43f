"""Spellings found in published checkpoints: each packs to the same bundle as what transformers writes today."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from artifacts import copied_folder, edit_json, full_return, lora_return, packed
from model_owner.test_pack import bits, logits, plain
from offsite.config import PlugInSpec
from offsite.errors import IncompatibleError
from offsite.model_owner.intake import intake
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.artifacts import Base
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import read_chunks
from tiny import KINDS, LANGUAGE, MakeBase, Parties, each_form

BLOCKS = 4
# One kind of each family.
PLAIN = each_form(next(kind for kind in KINDS if KINDS[kind]["family"] == family) for family in LANGUAGE)


def respelled(
    base: Path, out: Path, change: Callable[[str], str], more: dict[str, np.ndarray[Any, Any]] | None = None
) -> Path:
    """A copy of a base with its tensors under other names, and with more of them."""
    copied_folder(base, out)
    save_file(
        {change(name): tensor for name, tensor in load_file(base / WEIGHTS).items()} | (more or {}), out / WEIGHTS
    )
    return out


def unprefixed(name: str) -> str:
    return name if name.startswith(("lm_head.", "embed_out.")) else name.partition(".")[2]


def buffers(family: str, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    """What files of 2022 hold beside the weights."""
    mask, floor, waves = np.ones((1, 1, 8, 8), np.uint8), np.full((), -1e9, np.float32), np.ones(4, np.float32)
    inner = {
        "llama": {"self_attn.rotary_emb.inv_freq": waves},
        "gpt2": {"attn.bias": mask, "attn.masked_bias": floor},
        "gptj": {"attn.bias": mask, "attn.masked_bias": floor},
        "gpt_neox": {"attention.bias": mask, "attention.masked_bias": floor, "attention.rotary_emb.inv_freq": waves},
        "phi": {"self_attn.rotary_emb.inv_freq": waves},
        "stablelm": {"self_attn.rotary_emb.inv_freq": waves},
        "mistral": {"self_attn.rotary_emb.inv_freq": waves},
    }[family]
    return {f"{prefix}.{index}.{path}": value for index in range(BLOCKS) for path, value in inner.items()}


def same_bundle(base: Path, other: Path, tmp_path: Path, parties: Parties) -> None:
    """Both pack to the same tensors and manifest; the other one's merged plug-in keeps its own spelling."""
    ours, theirs = (
        packed(folder, tmp_path / name, parties, keep=1) for folder, name in ((base, "ours"), (other, "theirs"))
    )
    assert bits(theirs.folder) == bits(ours.folder)
    told = {"files", "issued_at"}
    assert theirs.manifest.model_dump(exclude=told) == ours.manifest.model_dump(exclude=told)
    assert torch.equal(logits(plain(theirs.folder)), logits(plain(ours.folder)))
    models = [load_model(folder, dtype=torch.float32, device=torch.device("cpu")) for folder in (base, other)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    # where in a file a weight lies may decide which way it is multiplied
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-6, atol=2e-6)
    for name, returned in (
        ("untouched", full_return(theirs, tmp_path / "full", parties.data_owner)),
        ("tuned", lora_return(theirs, tmp_path / "lora", parties.data_owner, b=0.1)),
    ):
        spec = PlugInSpec.model_validate({"as": "merged"})
        made = plug_in(Base(other), intake(returned.folder, parties.owner), tmp_path / name, spec, parties.owner)
        stored, before = (open_checkpoint(folder).tensors for folder in (made.folder, other))
        assert stored.keys() == before.keys()
        changed = {n for n in stored if b"".join(read_chunks(stored[n])) != b"".join(read_chunks(before[n]))}
        family = ARCHITECTURES[ours.manifest.architecture]
        targets = {
            f"{family.in_block(theirs_index, path)}.weight"
            for theirs_index in (0, BLOCKS - 1)
            for path in family.lora_linears
        }
        assert {family.name_of(n) for n in changed} == (set() if name == "untouched" else targets)


@pytest.mark.parametrize("kind", PLAIN)
def test_names_without_the_bodys_prefix(base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    other = respelled(base, tmp_path / "other", unprefixed)
    assert not open_checkpoint(other).tensors.keys() & open_checkpoint(base).tensors.keys() - {
        "lm_head.weight",
        "lm_head.bias",
        "embed_out.weight",
    }
    same_bundle(base, other, tmp_path, parties)


@pytest.mark.parametrize("kind", ["llama untied", "gpt2 tied", "gptj", "gpt_neox", "phi", "stablelm", "mistral"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_masks_and_frequencies_among_the_weights(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str, prefixed: bool
) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    family = ARCHITECTURES[KINDS[kind]["family"]]
    prefix = family.blocks if prefixed else unprefixed(family.blocks)
    more = buffers(family.model_type, prefix)
    other = respelled(base, tmp_path / "other", (lambda name: name) if prefixed else unprefixed, more)
    same_bundle(base, other, tmp_path, parties)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_tied_head_that_is_stored_all_the_same(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str
) -> None:
    base = base_of(blocks=BLOCKS, **(KINDS[kind] | {"tied": True}))
    family = ARCHITECTURES[KINDS[kind]["family"]]
    head = load_file(base / WEIGHTS)[next(iter(family.embeddings))]
    same_bundle(base, respelled(base, tmp_path / "other", lambda name: name, {family.head: head}), tmp_path, parties)


def test_a_tied_head_that_is_stored_and_another_is_refused(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of(blocks=BLOCKS, tied=True)
    head = load_file(base / WEIGHTS)["model.embed_tokens.weight"] + 1
    other = respelled(base, tmp_path / "other", lambda name: name, {"lm_head.weight": head})
    with pytest.raises(IncompatibleError, match="holds another head") as caught:
        packed(other, tmp_path / "bundle", parties, keep=1)
    assert "tie_word_embeddings" in (caught.value.next_step or "")
    edit_json(other / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in open_checkpoint(packed(other, tmp_path / "bundle", parties, keep=1).folder).tensors


MIXTURES = [kind for kind in KINDS if ARCHITECTURES[KINDS[kind]["family"]].experts]


def stacked(base: Path, out: Path) -> Path:
    """A copy of a base with its experts stacked in the file under the modules' names, as transformers can save it."""
    copied_folder(base, out)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(out, save_original_format=False)
    names = open_checkpoint(out).tensors.keys()
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    assert not any(".experts.0." in name or "block_sparse_moe" in name for name in names)
    return out


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_stacked_in_the_file(base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    other = stacked(base, tmp_path / "other")
    same_bundle(base, other, tmp_path, parties)
    bundle = packed(other, tmp_path / "bundle", parties, keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, lambda name, shipped: shipped * 1.25)
    ours, theirs = (
        plug_in(
            Base(folder), intake(returned.folder, parties.owner), tmp_path / name, PlugInSpec(again=True), parties.owner
        ).folder
        for folder, name in ((base, "from-matrices"), (other, "from-stacks"))
    )
    assert open_checkpoint(theirs).tensors.keys() == open_checkpoint(other).tensors.keys()
    assert not torch.equal(logits(plain(theirs)), logits(plain(base)))
    states = [plain(folder).state_dict() for folder in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_module_name_of_neoxs_head(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("gpt_neox", BLOCKS)
    other = respelled(base, tmp_path / "other", lambda name: name.replace("embed_out.", "lm_head."))
    assert "lm_head.weight" in open_checkpoint(other).tensors
    same_bundle(base, other, tmp_path, parties)


def rewritten(base: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a base with a config as it was written years ago."""
    copied_folder(base, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def rope_of_old(config: dict[str, Any]) -> None:
    """Rotary settings beside the others instead of in one dictionary."""
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]


def neox_of_old(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    for key in ("attention_bias", "use_parallel_residual", "tie_word_embeddings", "dtype"):
        config.pop(key)


def gemma_of_old(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": 3,
    }
    for key in ("layer_types", "_sliding_window_pattern", "tie_word_embeddings"):
        config.pop(key)


def qwen3_mixture_as_published(config: dict[str, Any]) -> None:
    rope_of_old(config)
    config |= {"num_experts": config.pop("num_local_experts"), "max_window_layers": 48, "router_aux_loss_coef": 0.001}


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: [config.pop(key) for key in keys]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama untied", rope_of_old),
        ("mistral with windows", rope_of_old),
        ("mistral", without("head_dim")),
        ("qwen2 tied, windows from block 2 on", without("layer_types")),
        ("qwen2", lambda config: [rope_of_old(config), config.pop("layer_types")]),
        ("qwen3", lambda config: [rope_of_old(config), config.pop("layer_types")]),
        ("mixtral", lambda config: [rope_of_old(config), config.pop("head_dim"), config.pop("router_jitter_noise")]),
        ("qwen2_moe, dense blocks, windows", without("layer_types", "decoder_sparse_step")),
        ("qwen2_moe", lambda config: [rope_of_old(config), without("layer_types", "mlp_only_layers")(config)]),
        ("qwen2_moe", without("qkv_bias", "norm_topk_prob")),
        ("qwen3_moe", qwen3_mixture_as_published),
        ("qwen3_moe tied, every second block dense", qwen3_mixture_as_published),
        ("stablelm, a norm per head", rope_of_old),
        ("smollm3", without("layer_types", "no_rope_layers", "tie_word_embeddings")),
        ("smollm3", without("layer_types", "no_rope_layer_interval")),
        ("gemma", lambda config: [rope_of_old(config), config.update(hidden_act="gelu", hidden_activation=None)]),
        ("gemma2", without("layer_types", "tie_word_embeddings")),
        ("gemma3", gemma_of_old),
        ("stablelm", rope_of_old),
        ("phi", rope_of_old),
        ("phi3", rope_of_old),
        ("gpt_neox", neox_of_old),
        ("gpt2 tied", lambda config: config.update(num_hidden_layers=BLOCKS, n_ctx=64)),
        ("gptj", lambda config: config.update(num_hidden_layers=BLOCKS, rotary=True)),
        ("bloom", lambda config: config.update(n_embed=config.pop("hidden_size"), num_hidden_layers=BLOCKS)),
        ("bloom", lambda config: config.update(num_attention_heads=config.pop("n_head"), offset_alibi=100)),
        ("opt", without("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings", "word_embed_proj_dim")),
        ("opt, projections, norms behind", without("enable_bias", "layer_norm_elementwise_affine")),
        ("falcon, one key head", without("parallel_attn", "num_ln_in_parallel_attn", "ffn_hidden_size")),
        ("falcon, new decoder", without("parallel_attn", "num_ln_in_parallel_attn", "tie_word_embeddings")),
    ],
)
def test_configs_of_their_time(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str, change: Callable[[dict[str, Any]], object]
) -> None:
    base = base_of(blocks=BLOCKS, **KINDS[kind])
    same_bundle(base, rewritten(base, tmp_path / "other", change), tmp_path, parties)


def test_two_spellings_of_the_block_count_agree(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    other = copied_folder(base_of("bloom", BLOCKS), tmp_path / "other")
    edit_json(other / "config.json", num_hidden_layers=BLOCKS)
    bundle = packed(other, tmp_path / "bundle", parties, keep=1)
    config = json.loads((bundle.folder / "config.json").read_text())
    assert (config["n_layer"], config["num_hidden_layers"]) == (3, 3)
