"""Packing: the bundle computes what the base's blocks compute, is an ordinary checkpoint, and tells nothing else."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from artifacts import copied_folder, edit_json, edit_weights, lora_return, packed
from offsite.config import PackSpec, PlugInSpec
from offsite.errors import IncompatibleError, StorageError, UsageError
from offsite.model_owner.intake import intake
from offsite.model_owner.ledger import Ledger
from offsite.model_owner.pack import pack
from offsite.model_owner.plugging_in.plug_in import plug_in
from offsite.models.families.architectures import ARCHITECTURES
from offsite.protocol.artifacts import Base
from offsite.protocol.manifest import MANIFEST
from offsite.protocol.verify import verify_bundle
from offsite.storage.checkpoint_folder import INDEX, WEIGHTS, open_checkpoint, write_checkpoint
from offsite.storage.safetensors_files import NewTensor, copied, read_chunks
from tiny import EVERY_KIND, KINDS, MakeBase, Parties

IDS = torch.tensor([[1, 5, 9, 40, 77, 3, 200], [1, 301, 12, 12, 8, 90, 4]])


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Loaded with nothing of ours, every key accounted for."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def cut(model: Any, kept: list[int]) -> Any:
    """A truncated model by hand: the blocks' modules themselves, in order."""
    path, _, name = ARCHITECTURES[model.config.model_type].blocks.rpartition(".")
    inner = model.get_submodule(path)
    setattr(inner, name, torch.nn.ModuleList(getattr(inner, name)[i] for i in kept))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    return model


def bits(folder: Path) -> dict[str, bytes]:
    return {name: b"".join(read_chunks(t)) for name, t in open_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("bottom", "top", "keep", "kept"), [(1, 1, 2, [0, 1, 3, 4]), (2, 0, 1, [0, 1, 2])])
def test_logits_are_those_of_a_truncated_model(
    base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str, bottom: int, top: int, keep: int, kept: list[int]
) -> None:
    base = base_of(blocks=5, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties, bottom=bottom, top=top, keep=keep)
    torch.testing.assert_close(logits(plain(bundle.folder)), logits(cut(plain(base), kept)), rtol=0, atol=1e-6)
    assert verify_bundle(bundle.folder, parties.data_owner) == bundle
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert list(issued.kept) == kept
    assert issued.state == "issued"
    assert issued.manifest == bundle.manifest


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_everything_kept_is_the_base(base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str) -> None:
    base = base_of(blocks=3, **KINDS[kind])
    bundle = packed(base, tmp_path / "bundle", parties)
    assert bits(bundle.folder) == bits(base)
    assert torch.equal(logits(plain(bundle.folder)), logits(plain(base)))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_generation_with_and_without_cache(base_of: MakeBase, parties: Parties, tmp_path: Path, kind: str) -> None:
    bundle = packed(base_of(blocks=5, **KINDS[kind]), tmp_path / "bundle", parties, keep=1)
    model = plain(bundle.folder)
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder)
    asked = tokenizer("two parties tune", return_tensors="pt")
    answers = [
        model.generate(**asked, max_new_tokens=16, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert answers[0].shape[1] == asked["input_ids"].shape[1] + 16
    assert torch.equal(*answers)


def test_tokenizer_is_the_bases(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of()
    bundle = packed(base, tmp_path / "bundle", parties)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (bundle.folder, base))
    for text in ("The bundle goes out", "", "a\n\tb <s> </s>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_added_tokens_of_a_slow_tokenizer_travel(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = copied_folder(base_of("gpt2"), tmp_path / "base")
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]))
    (base / "added_tokens.json").write_text(json.dumps({"<|user|>": len(model["vocab"])}))
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    bundle = packed(base, tmp_path / "bundle", parties)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (bundle.folder, base))
    assert ours("<|user|>hello")["input_ids"] == theirs("<|user|>hello")["input_ids"]
    assert len(model["vocab"]) in ours("<|user|>hello")["input_ids"]
    assert verify_bundle(bundle.folder, parties.data_owner) == bundle


def test_bundle_in_bfloat16(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = base_of(tied=False)
    bundle = packed(base, tmp_path / "bundle", parties, dtype="bf16")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in plain(base).state_dict().items()}
    found = plain(bundle.folder, torch.bfloat16).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {entry.dtype for entry in bundle.manifest.tensors.values()} == {"BF16"}
    assert AutoModelForCausalLM.from_pretrained(bundle.folder).dtype == torch.bfloat16


SECRET = "SECRET-of-acme"


def test_nothing_of_the_owners_travels(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = copied_folder(base_of("gpt2", 4), tmp_path / f"{SECRET}-base")
    edit_json(
        base / "config.json",
        _name_or_path=f"/home/{SECRET}",
        auto_map={"AutoModel": f"{SECRET}.Model"},
        task_specific_params={"text": {"note": SECRET}},
        _attn_implementation=SECRET,
        id2label={"0": SECRET},
    )
    edit_json(base / "tokenizer_config.json", name_or_path=f"/home/{SECRET}", note=SECRET, auto_map={SECRET: SECRET})
    edit_json(base / "generation_config.json", transformers_version=SECRET, custom=SECRET)
    for name in ("README.md", "training_args.bin", "optimizer.pt", "notes.safetensors.txt", "vocab_extra.json"):
        (base / name).write_text(SECRET)
    (base / SECRET).mkdir()
    bundle = packed(base, tmp_path / "bundle", parties, keep=1)
    for file in bundle.folder.iterdir():
        content = file.read_bytes()
        assert SECRET.encode() not in content, file.name
        assert str(tmp_path).encode() not in content, file.name
        assert b"acme" not in content, file.name
        assert b"hospital" not in content, file.name
    names = {p.name for p in bundle.folder.iterdir()}
    assert names == {entry.name for entry in bundle.manifest.files} | {MANIFEST, f"{MANIFEST}.sig"}


def test_which_blocks_were_kept_is_not_told(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Two bundles with other blocks differ in weights and digests alone."""
    base = base_of(blocks=6)
    told = []
    for seed in (0, 3):
        bundle = packed(base, tmp_path / f"{seed}", parties, keep=2, select="random", seed=seed)
        manifest = bundle.manifest.model_dump(exclude={"files", "issued_at"})
        told.append((manifest, (bundle.folder / "config.json").read_bytes()))
    assert told[0] == told[1]
    ledger = Ledger(parties.owner.ledger)
    digests = [verify_bundle(tmp_path / f"{seed}", parties.owner).digest for seed in (0, 3)]
    kept = [issued.kept for digest in digests if (issued := ledger.issued(digest))]
    assert kept[0] != kept[1]


def test_fingerprint_is_the_owners_alone(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    from offsite.model_owner.base_model import fingerprint, open_base

    model = open_base(Base(base_of()))
    ours, theirs = (fingerprint(model, home.identity()) for home in (parties.owner, parties.data_owner))
    assert ours != theirs
    assert ours == fingerprint(model, parties.owner.identity())
    assert ours == packed(base_of(), tmp_path / "bundle", parties).manifest.base


# --- other spellings of the same base ---


def sharded(base: Path, out: Path, tensors: list[NewTensor] | None = None) -> Path:
    out.mkdir()
    for file in base.iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, out)
    write_checkpoint(out, tensors or [copied(t) for t in open_checkpoint(base).tensors.values()], shard_bytes=30_000)
    assert (out / INDEX).is_file()
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sharded_base_packs_to_the_same(base_of: MakeBase, parties: Parties, tmp_path: Path, family: str) -> None:
    base = base_of(family)
    whole = packed(base, tmp_path / "whole", parties, keep=1)
    parts = packed(sharded(base, tmp_path / "sharded"), tmp_path / "parts", parties, keep=1)
    assert whole.manifest.model_dump(exclude={"issued_at"}) == parts.manifest.model_dump(exclude={"issued_at"})


def test_sharded_bundle(base_of: MakeBase, parties: Parties, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offsite.model_owner import pack as module

    base = base_of(tied=False)
    whole = packed(base, tmp_path / "whole", parties, keep=1)
    monkeypatch.setattr(module, "write_checkpoint", functools.partial(write_checkpoint, shard_bytes=30_000))
    parts = packed(base, tmp_path / "parts", parties, keep=1)
    assert (parts.folder / INDEX).is_file()
    assert sum(name.startswith("model-000") for name in (p.name for p in parts.folder.iterdir())) > 2
    assert verify_bundle(parts.folder, parties.data_owner) == parts
    assert bits(parts.folder) == bits(whole.folder)
    assert torch.equal(logits(plain(parts.folder)), logits(plain(whole.folder)))


def test_gpt2_as_it_was_published(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Without the prefix, with attention's mask among the weights, with the copy of the tied head, in old keys."""
    import numpy as np

    from offsite.storage.safetensors_files import from_array

    base = base_of("gpt2", 4)
    held = open_checkpoint(base).tensors
    tensors = [copied(t, name=name.removeprefix("transformer.")) for name, t in held.items()]
    tensors += [from_array(f"h.{i}.attn.bias", np.ones((1, 1, 8, 8), np.float32), "F32") for i in range(4)]
    tensors += [from_array(f"h.{i}.attn.masked_bias", np.full((), -1e4, np.float32), "F32") for i in range(4)]
    tensors.append(copied(held["transformer.wte.weight"], name="lm_head.weight"))
    old = sharded(base, tmp_path / "old", tensors)
    edit_json(old / "config.json", n_ctx=64)
    new, ancient = packed(base, tmp_path / "new", parties, keep=1), packed(old, tmp_path / "a", parties, keep=1)
    assert bits(new.folder) == bits(ancient.folder)
    assert new.manifest.base == ancient.manifest.base
    assert torch.equal(logits(plain(new.folder)), logits(plain(ancient.folder)))


def test_llama_with_old_rope_settings(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base = copied_folder(base_of(), tmp_path / "old")
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    (base / "config.json").write_text(json.dumps(config))
    bundle = packed(base, tmp_path / "bundle", parties)
    assert torch.equal(logits(plain(bundle.folder)), logits(plain(base)))


# --- refusals, before anything is written ---


def refused(
    base: Path, parties: Parties, out: Path, error: type[Exception], says: str, recipient: str = "hospital", **spec: Any
) -> Any:
    settings = {"bottom": 1, "top": 1, "keep": 1, "heal": "none", **spec}
    with pytest.raises(error, match=says) as caught:
        pack(Base(base), out, recipient, PackSpec.model_validate(settings), parties.owner)
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.endswith(".tmp") or p.name.startswith(".")] == []
    assert caught.value.next_step  # type: ignore[attr-defined]
    return caught.value


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"keep": 4}, "cannot keep 4 blocks of a middle of 3"),
        ({"bottom": 3, "top": 2}, "of a middle of 0"),
        ({"bottom": 30, "top": 2}, "of a middle of 0"),
    ],
)
def test_keep_over_the_middle(
    base_of: MakeBase, parties: Parties, tmp_path: Path, spec: dict[str, int], says: str
) -> None:
    error = refused(base_of(), parties, tmp_path / "out", UsageError, says, **spec)
    assert error.exit_code == 2
    assert "the base has 5 blocks" in error.reasons[0]


def test_unknown_recipient(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    refused(base_of(), parties, tmp_path / "out", UsageError, "'nobody' is trusted|'eve' is trusted", recipient="eve")


def drop(name: str) -> Callable[[Path], None]:
    return lambda base: edit_weights(base / WEIGHTS, lambda w: w.pop(name) is None or None)


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda base: edit_weights(base / WEIGHTS, lambda w: w.update({new: w.pop(old)}))


def double(base: Path) -> None:
    edit_weights(base / WEIGHTS, lambda w: w.update({"wte.weight": w["transformer.wte.weight"]}))


@pytest.mark.parametrize(
    ("family", "spoil", "says"),
    [
        ("llama", drop("model.layers.2.mlp.up_proj.weight"), "missing model.layers.2.mlp.up_proj.weight"),
        ("llama", drop("model.norm.weight"), "missing model.norm.weight"),
        ("llama", rename("model.norm.weight", "model.norm.gain"), "unexpected model.norm.gain"),
        ("llama", lambda b: edit_json(b / "config.json", num_hidden_layers=6), "missing model.layers.5"),
        ("llama", lambda b: edit_json(b / "config.json", num_hidden_layers=4), "unexpected model.layers.4"),
        ("llama", lambda b: edit_json(b / "config.json", num_hidden_layers=[4]), "how many blocks"),
        ("llama", lambda b: edit_json(b / "config.json", tie_word_embeddings=False), "missing lm_head.weight"),
        ("llama", lambda b: edit_json(b / "config.json", model_type="t5"), "'t5' are not supported"),
        ("llama", lambda b: edit_json(b / "config.json", model_type=["llama"]), "are not supported"),
        ("llama", lambda b: edit_json(b / "config.json", hidden_act="/home/acme/act.py"), "may not travel"),
        ("gpt2", lambda b: edit_json(b / "config.json", num_hidden_layers=7), "how many blocks"),
        ("gpt2", lambda b: edit_json(b / "config.json", scale_attn_by_inverse_layer_idx=True), "by their position"),
        ("gpt2", double, "under two spellings"),
        ("gpt2", lambda b: edit_json(b / "config.json", n_positions=63), "the config makes it"),
        ("llama", lambda b: edit_json(b / "tokenizer_config.json", tokenizer_class="a.b"), "may not travel"),
    ],
)
def test_base_that_does_not_fit(
    base_of: MakeBase, parties: Parties, tmp_path: Path, family: str, spoil: Callable[[Path], None], says: str
) -> None:
    base = copied_folder(base_of(family), tmp_path / "spoiled")
    spoil(base)
    assert refused(base, parties, tmp_path / "out", IncompatibleError, says).exit_code == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "cannot read"),
        ("config.json", b"[]", "not a JSON object"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("model.safetensors", b"123", "not a sound safetensors"),
        ("tokenizer.json", None, "holds no tokenizer"),
        ("tokenizer_config.json", b"{", "is not JSON"),
    ],
)
def test_base_with_a_broken_file(
    base_of: MakeBase, parties: Parties, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    base = copied_folder(base_of(), tmp_path / "spoiled")
    (base / name).unlink()
    if content is not None:
        (base / name).write_bytes(content)
    assert refused(base, parties, tmp_path / "out", StorageError, says).exit_code == 1


@pytest.mark.parametrize(
    ("spec", "idle"),
    [
        ({"keep": None, "bits": 4, "heal": "refit,distill"}, "refit,distill"),
        ({"keep": None, "svd_rank": 0.5, "heal": "refit"}, "refit"),
        ({"keep": None, "prune": 0.5, "prune_by": "magnitude", "heal": "distill"}, "distill"),
        ({"keep": 3, "prune": 0, "heal": "affine"}, "affine"),
        ({"keep": 3, "heal": "share"}, "share"),
    ],
)
def test_healing_that_was_asked_for_and_would_do_nothing(
    base_of: MakeBase, parties: Parties, tmp_path: Path, spec: dict[str, Any], idle: str
) -> None:
    refused(base_of(), parties, tmp_path / "out", UsageError, f"--heal {idle} would do nothing", **spec)


def test_the_usual_healing_is_left_out_where_it_would_do_nothing(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    spec = PackSpec(bottom=1, top=1, bits=4).changed({"threads": 1})
    assert pack(Base(base_of()), tmp_path / "out", "hospital", spec, parties.owner).manifest.requires == ("quantise",)


def test_a_bundle_or_return_is_no_base_but_a_merged_plug_in_may_be_one(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    bundle = packed(base_of(), tmp_path / "bundle", parties, keep=2)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    refused(bundle.folder, parties, tmp_path / "out", UsageError, "is a bundle, expected a base")
    refused(returned.folder, parties, tmp_path / "out", UsageError, "is a return, expected a base")
    spec = PlugInSpec.model_validate({"as": "merged"})
    merged = plug_in(
        Base(base_of()), intake(returned.folder, parties.owner), tmp_path / "plugged", spec, parties.owner
    ).folder
    assert packed(merged, tmp_path / "again", parties).manifest.base != bundle.manifest.base


def test_output_that_holds_something(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="not an empty folder"):
        packed(base_of(), tmp_path / "out", parties)
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_methods_that_have_nothing_to_train(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Llama has no biases, so BitFit is not offered; where nothing else is permitted, nothing is packed."""
    assert packed(base_of("llama", 3), tmp_path / "a", parties).manifest.methods == ("lora", "full", "bottleneck")
    assert packed(base_of("gpt2", 3), tmp_path / "b", parties).manifest.methods == (
        "lora",
        "full",
        "bitfit",
        "bottleneck",
    )
    with pytest.raises(UsageError, match="BitFit trains biases"):
        packed(base_of("llama", 3), tmp_path / "c", parties, methods=("bitfit",))
    assert not (tmp_path / "c").exists()
