"""Plugging in: an untouched adapter gives the base back bit for bit; every form and every view computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts import (
    bottleneck_return,
    copied_folder,
    edit_json,
    edit_weights,
    full_return,
    lora_return,
    packed,
    with_earlier,
)
from model_owner.test_pack import bits, logits, plain, sharded
from offsite.config import PlugInSpec
from offsite.errors import UsageError, VerificationError
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.plugging_in import plugged_tensors
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.models.adapted import load_bottlenecked, load_replaced
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import Base, PlugIn
from offsite.protocol.verify import verify_plug_in
from offsite.storage.checkpoint_folder import INDEX, open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import EVERY_KIND, KINDS, MakeBase, Parties

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Array = np.ndarray[Any, np.dtype[np.float32]]


def plugged(base: Path, returned: Path, out: Path, parties: Parties, **spec: Any) -> PlugIn:
    settings = PlugInSpec.model_validate({"again": True, **spec})
    return plug_in(Base(base), intake(returned, parties.owner), out, settings, parties.owner)


def noise(name: str, shipped: Array) -> Array:
    draw = np.random.default_rng(len(name))
    return shipped + 0.1 * draw.standard_normal(shipped.shape).astype(np.float32)


# --- an untouched adapter ---


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_untouched_gives_the_base_back(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str, dtype: str, method: str
) -> None:
    base = base_of(blocks=3, dtype=dtype, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, dtype=dtype)
    if method == "lora":
        returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.0)
    else:
        returned = full_return(bundle, tmp_path / "return", parties.data_owner)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties, **{"as": "merged"})
    assert bits(made.folder) == bits(base)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.folder / name).read_bytes() == (base / name).read_bytes()
    assert {t.dtype for t in open_checkpoint(made.folder).tensors.values()} == {"BF16" if dtype == "bf16" else "F32"}


def test_bitfit_changes_the_biases_alone(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("gpt2", 5)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, lambda n, a: a + np.float32(0.5), "bitfit")
    made = plugged(base, returned.folder, tmp_path / "plugged", parties)
    assert made.manifest.form == "merged"
    before, after = plain(base).state_dict(), plain(made.folder).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.endswith(".bias") and name.split(".")[2] in ("0", "4")}
    assert all(torch.equal(after[name], before[name] + 0.5) for name in changed)
    with pytest.raises(UsageError, match="no adapter folder can carry"):
        plugged(base, returned.folder, tmp_path / "adapter", parties, **{"as": "adapter"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_bottlenecks_are_mapped_back(base_of: MakeBase, parties: Parties, tmp_path: Path, family: str) -> None:
    base = base_of(family, 5)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = bottleneck_return(bundle, tmp_path / "return", parties.data_owner)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties)
    assert made.manifest.form == "adapter"
    weights, kind = made.folder / "bottleneck.safetensors", {"dtype": torch.float32, "device": torch.device("cpu")}
    family = ARCHITECTURES[family]
    names = {name: family.block_of(name) for name in read_header(weights)}
    assert {place[0] for place in names.values() if place} == {0, 4}
    model, sent = (
        load_bottlenecked(base, weights.parent, weights.name, **kind),
        read_header(returned.folder / weights.name),
    )
    own = dict(model.named_parameters())
    for name, place in names.items():
        assert place is not None
        shipped = sent[family.in_block({0: 0, 4: 2}[place[0]], place[1])]
        assert np.array_equal(own[name].numpy(), read_float32(shipped))
    assert (logits(model) - logits(plain(base))).abs().max() > 0.1
    flat = bottleneck_return(bundle, tmp_path / "flat", parties.data_owner, up=0.0)
    flat_made = plugged(base, flat.folder, tmp_path / "flat-plugged", parties)
    assert torch.equal(logits(load_bottlenecked(base, flat_made.folder, weights.name, **kind)), logits(plain(base)))
    with pytest.raises(UsageError, match="cannot be merged"):
        plugged(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"})


def test_untouched_in_full_from_a_rounded_bundle(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """What shipping in bf16 rounds away is not taken from the base."""
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, dtype="bf16", keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner)
    assert bits(plugged(base, returned.folder, tmp_path / "plugged", parties).folder) == bits(base)


def test_signs_of_zeros_stay(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = copied_folder(base_of(blocks=3), tmp_path / "zeros")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(base / "model.safetensors", lambda w: w.update({name: np.full_like(w[name], -0.0)}))
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.0)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties, **{"as": "merged"})
    assert bits(made.folder)[name] == bits(base)[name] == b"\0\0\0\x80" * (48 * 32)


# --- views of the same adapter ---


def with_adapter(model: Any, adapter: Path) -> Any:
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_lora_adapter_merged_and_the_data_owners_view_agree(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str
) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, bottom=2, top=1, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.1)
    adapter = plugged(base, returned.folder, tmp_path / "adapter", parties)
    merged = plugged(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"})
    assert (adapter.manifest.form, merged.manifest.form) == ("adapter", "merged")
    views = [
        logits(with_adapter(plain(base), adapter.folder)),
        logits(plain(merged.folder)),
        logits(with_adapter(plain(bundle.folder), returned.folder)),
    ]
    for view in views[1:]:
        torch.testing.assert_close(view, views[0], rtol=1e-5, atol=1e-5)
    assert (views[0] - logits(plain(base))).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(merged.folder)("x")["input_ids"]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_full_merged_and_the_data_owners_view_agree(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str
) -> None:
    base = base_of(blocks=3, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, noise)
    merged = plugged(base, returned.folder, tmp_path / "merged", parties)
    assert merged.manifest.form == "merged"
    tuned = copied_folder(bundle.folder, tmp_path / "tuned")
    held = {name: read_float32(tensor) for name, tensor in open_returned(returned.folder).items()}
    assert set(held) == set(bundle.manifest.tensors)
    edit_weights(tuned / "model.safetensors", lambda w: w.update(held))
    own = plain(tuned)
    torch.testing.assert_close(logits(plain(merged.folder)), logits(own), rtol=1e-5, atol=1e-5)
    weights = returned.folder / "adapter.safetensors"
    view = load_replaced(bundle.folder, weights.parent, weights.name, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(logits(view), logits(own), rtol=1e-5, atol=1e-5)
    assert (logits(own) - logits(plain(base))).abs().max() > 0.1


def open_returned(folder: Path) -> Any:
    from offsite.storage.safetensors_files import read_header

    return read_header(folder / "adapter.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_block_indices_are_mapped_back(base_of: MakeBase, parties: Parties, tmp_path: Path, family: str) -> None:
    """Blocks 0 and 1, then 2 of 4 dropped, then 6: the bundle's last block is the base's seventh."""
    base = base_of(family, 7)
    bundle = packed(base, tmp_path / "bundle", parties, bottom=2, top=1, keep=1)
    assert bundle.manifest.split.blocks == 4
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.1)
    adapter = plugged(base, returned.folder, tmp_path / "adapter", parties).folder
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {target.split(".")[2] for target in config["target_modules"]} == {"0", "1", "6"}
    model = with_adapter(plain(base), adapter)
    on = {n.split(".")[4] for n, _ in model.named_parameters() if "lora_A" in n}
    assert on == {"0", "1", "6"}
    merged = plugged(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"}).folder
    torch.testing.assert_close(logits(model), logits(plain(merged)), rtol=1e-5, atol=1e-5)
    changed = {n.split(".")[2] for n, raw in bits(merged).items() if raw != bits(base)[n]}
    assert changed == {"0", "1", "6"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_is_what_peft_merges(base_of: MakeBase, parties: Parties, tmp_path: Path, family: str) -> None:
    base = base_of(family, 3)
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, rank=3, alpha=7.0)
    adapter = plugged(base, returned.folder, tmp_path / "adapter", parties).folder
    theirs = with_adapter(plain(base), adapter).merge_and_unload().state_dict()
    ours = plain(plugged(base, returned.folder, tmp_path / "m", parties, **{"as": "merged"}).folder).state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("returns", [lora_return, full_return])
def test_a_tensor_is_merged_some_rows_at_a_time(
    base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, returns: Any
) -> None:
    bundle = packed(base_of(family), tmp_path / "bundle", parties)
    changes = (noise,) if returns is full_return else ()
    returned = returns(bundle, tmp_path / "return", parties.data_owner, *changes)
    whole = plugged(base_of(family), returned.folder, tmp_path / "whole", parties, as_="merged")
    monkeypatch.setattr(plugged_tensors, "_PART", 100)
    parts = plugged(base_of(family), returned.folder, tmp_path / "parts", parties, as_="merged")
    expected, found = (open_checkpoint(one.folder).tensors for one in (whole, parts))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(read_float32(found[name]), read_float32(tensor), rtol=1e-5, atol=1e-6)


def test_full_return_is_added_and_rounded_once(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """base + (returned - shipped), in float32, then to the base's dtype; everything else as it was."""
    base = base_of("llama", 4, dtype="bf16")
    bundle = packed(base, tmp_path / "bundle", parties, dtype="bf16", keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, noise)
    merged = plugged(base, returned.folder, tmp_path / "merged", parties).folder
    state, new = plain(base, torch.bfloat16).state_dict(), plain(merged, torch.bfloat16).state_dict()
    held = open_returned(returned.folder)
    for name, value in state.items():
        block = name.split(".")[2] if ".layers." in name else None
        if block in ("0", "3"):
            sent = torch.from_numpy(read_float32(held[name.replace("layers.3.", "layers.2.")]).copy())
            expected = (value.float() + (sent - value.float())).to(torch.bfloat16)
            assert torch.equal(new[name], expected)
        else:
            assert torch.equal(new[name], value)


def test_full_return_of_a_rounded_bundle(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("gpt2", 3)
    bundle = packed(base, tmp_path / "bundle", parties, dtype="bf16")
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, noise)
    merged = plugged(base, returned.folder, tmp_path / "merged", parties).folder
    state, new = plain(base).state_dict(), plain(merged).state_dict()
    name = "transformer.h.2.mlp.c_fc.weight"
    sent = torch.from_numpy(read_float32(open_returned(returned.folder)[name]).copy())
    assert torch.equal(new[name], state[name] + (sent - state[name].to(torch.bfloat16).float()))


def test_sharded_base(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("llama", 4)
    parts = sharded(base, tmp_path / "parts")
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    whole = plugged(base, returned.folder, tmp_path / "a", parties, **{"as": "merged"})
    other = plugged(parts, returned.folder, tmp_path / "b", parties, **{"as": "merged"})
    assert bits(whole.folder) == bits(other.folder)
    assert not (other.folder / INDEX).exists()


def test_old_gpt2_keeps_its_spelling(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    from offsite.storage.safetensors_files import copied

    base = base_of("gpt2", 3)
    held = open_checkpoint(base).tensors
    old = sharded(base, tmp_path / "old", [copied(t, name=n.removeprefix("transformer.")) for n, t in held.items()])
    bundle = packed(old, tmp_path / "bundle", parties, keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, noise)
    a = plugged(old, returned.folder, tmp_path / "a", parties).folder
    b = plugged(base, returned.folder, tmp_path / "b", parties).folder
    assert set(bits(a)) == {n.removeprefix("transformer.") for n in held}
    assert {f"transformer.{n}": raw for n, raw in bits(a).items()} == bits(b)


# --- strength ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_strength_scales_lora_once(
    base_of: MakeBase, parties: Parties, tmp_path: Path, family: str, strength: float
) -> None:
    """In both forms: base + strength * alpha / rank * B A, as PEFT has it when its scaling is multiplied."""
    base = base_of(family, 4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=0.1)
    whole = plugged(base, returned.folder, tmp_path / "whole", parties)
    adapter = plugged(base, returned.folder, tmp_path / "adapter", parties, strength=strength)
    merged = plugged(base, returned.folder, tmp_path / "merged", parties, strength=strength, **{"as": "merged"})
    assert adapter.manifest.strength == merged.manifest.strength == strength
    oracle = with_adapter(plain(base), whole.folder)
    for module in oracle.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= strength
    torch.testing.assert_close(logits(with_adapter(plain(base), adapter.folder)), logits(oracle), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(plain(merged.folder)), logits(oracle), rtol=1e-4, atol=1e-4)
    assert (bits(merged.folder) == bits(base)) == (strength == 0)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_strength_of_own_tensors(base_of: MakeBase, parties: Parties, tmp_path: Path, method: Any) -> None:
    base = base_of("gpt2", 4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, lambda n, a: a + np.float32(0.5), method)
    half = plugged(base, returned.folder, tmp_path / "half", parties, strength=0.5)
    before, after = plain(base).state_dict(), plain(half.folder).state_dict()
    name = "transformer.h.3.mlp.c_proj.bias"
    torch.testing.assert_close(after[name], before[name] + 0.25)
    none = plugged(base, returned.folder, tmp_path / "none", parties, strength=0.0)
    assert bits(none.folder) == bits(base)


def test_strength_of_bottlenecks(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("llama", 4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = bottleneck_return(bundle, tmp_path / "return", parties.data_owner)
    whole = read_header(plugged(base, returned.folder, tmp_path / "a", parties).folder / "bottleneck.safetensors")
    half = plugged(base, returned.folder, tmp_path / "b", parties, strength=0.5).folder / "bottleneck.safetensors"
    for name, tensor in read_header(half).items():
        factor = np.float32(0.5 if ".up." in name else 1)
        assert np.array_equal(read_float32(tensor), factor * read_float32(whole[name]))
    none = plugged(base, returned.folder, tmp_path / "c", parties, strength=0.0).folder / "bottleneck.safetensors"
    model = load_bottlenecked(base, none.parent, none.name, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(logits(model), logits(plain(base)))


def test_strength_that_overflows(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("llama", 3)
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner, b=7e37)
    with pytest.raises(VerificationError, match="at this strength"):
        plugged(base, returned.folder, tmp_path / "out", parties, strength=1.5)
    assert not (tmp_path / "out").exists()


# --- checkpoints ---


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck"])
def test_each_checkpoint_is_plugged_in_like_a_return_of_its_own(
    base_of: MakeBase, parties: Parties, tmp_path: Path, method: str
) -> None:
    base = base_of("llama", 4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    home, made = parties.data_owner, []
    for seed in range(3):
        out = tmp_path / f"return{seed}"
        if method == "lora":
            made.append(lora_return(bundle, out, home, seed=seed))
        elif method == "full":
            made.append(full_return(bundle, out, home, lambda name, shipped, by=seed: shipped + np.float32(by + 1)))
        else:
            made.append(bottleneck_return(bundle, out, home, seed=seed))
    alone = [plugged(base, one.folder, tmp_path / f"alone{i}", parties).folder for i, one in enumerate(made)]
    folder = with_earlier(made[2], made[:2], home)
    weights = {"lora": "adapter_model", "full": "model", "bottleneck": "bottleneck"}[method] + ".safetensors"
    for number, expected in enumerate(alone, 1):
        found = plugged(base, folder, tmp_path / f"checkpoint{number}", parties, checkpoint=number)
        assert found.manifest.checkpoint == number
        assert (found.folder / weights).read_bytes() == (expected / weights).read_bytes()
    assert (alone[0] / weights).read_bytes() != (alone[2] / weights).read_bytes()
    last = plugged(base, folder, tmp_path / "last", parties)
    assert last.manifest.checkpoint == 3
    assert (last.folder / weights).read_bytes() == (alone[2] / weights).read_bytes()
    with pytest.raises(UsageError, match="has no checkpoint 4"):
        plugged(base, folder, tmp_path / "fourth", parties, checkpoint=4)
    assert not (tmp_path / "fourth").exists()


# --- what stands beside ---


def test_lineage_and_ledger(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties)
    assert verify_plug_in(made.folder, parties.owner) == made
    assert verify_plug_in(made.folder, parties.data_owner) == made
    assert (made.manifest.base, made.manifest.bundle) == (bundle.manifest.base, bundle.digest)
    assert made.manifest.returned == returned.digest
    ledger = Ledger(parties.owner.ledger)
    issued = ledger.issued(bundle.digest)
    assert issued is not None
    assert issued.state == "plugged in"
    assert ledger.intakes(returned.digest) == [("accepted", [])]
    assert len(ledger.plugged_in(returned)) == 1


def test_several_returns_of_one_bundle(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """The data owner may send more than one checkpoint; each is plugged in once without --again."""
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    for seed in (1, 2):
        returned = lora_return(bundle, tmp_path / f"return{seed}", parties.data_owner, seed=seed)
        plugged(base, returned.folder, tmp_path / f"plugged{seed}", parties, again=False)


def test_base_that_was_only_moved(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of(blocks=4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    moved = copied_folder(base, tmp_path / "moved")
    edit_json(moved / "config.json", _name_or_path="elsewhere")
    assert plugged(moved, returned.folder, tmp_path / "plugged", parties).folder.is_dir()


def test_merged_loads_as_its_base_does(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of("gpt2", 3, tied=False)
    bundle = packed(base, tmp_path / "bundle", parties)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    made = plugged(base, returned.folder, tmp_path / "plugged", parties, **{"as": "merged"})
    assert AutoModelForCausalLM.from_pretrained(made.folder).config.to_dict() == (
        AutoModelForCausalLM.from_pretrained(base).config.to_dict() | {"_name_or_path": str(made.folder)}
    )
