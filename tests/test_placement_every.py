"""The whole chain with adapters on compressed blocks: what comes back lands at its own places in the base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import offsite
from artifacts import edit_weights, full_return, lora_return
from offsite import Base, EvalSpec, PackSpec, PlugInSpec, TuneSpec
from offsite.config import Method
from offsite.errors import UsageError
from offsite.model_owner.carry_map import CarryMap
from offsite.model_owner.ledger import Ledger
from offsite.models.block_widths import neuron_layers
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.contents import WEIGHTS_OF
from offsite.storage.checkpoint_folder import WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import EVERY_KIND, KINDS, MakeBase, Parties, each_form, tiny_base, tiny_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EXACT = EvalSpec(compute="fp32", device="cpu", threads=1)
BLOCKS = 4
# Every way to make an emulator; the blocks of the base that its adapters belong to.
COMPRESSIONS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "pruned by sparsegpt, refit": ({}, {0, 1, 2, 3}),
    "pruned by magnitude": ({"prune": 0.5, "prune_by": "magnitude", "heal": "none"}, {0, 1, 2, 3}),
    "pruned by wanda": ({"prune": 0.5, "prune_by": "wanda", "heal": "none"}, {0, 1, 2, 3}),
    "zeros left out": ({"prune": 0.5, "zeros": "left-out", "heal": "none"}, {0, 1, 2, 3}),
    "8 bits": ({"bits": 8}, {0, 1, 2, 3}),
    "4 bits": ({"bits": 4}, {0, 1, 2, 3}),
    "low rank": ({"svd_rank": 0.5}, {0, 1, 2, 3}),
    "narrow MLPs": ({"mlp_width": 0.5}, {0, 1, 2, 3}),
    "narrow heads and MLPs": ({"narrow": 0.55}, {0, 1, 2, 3}),
    "narrow heads and MLPs, by budget": ({"narrow": 0.6, "narrow_widths": "budget"}, {0, 1, 2, 3}),
    "narrow heads and MLPs, in 8 bits, refit": ({"narrow": 0.6, "bits": 8, "heal": "refit"}, {0, 1, 2, 3}),
    "narrow MLPs in 8 bits": ({"mlp_width": 0.5, "bits": 8}, {0, 1, 2, 3}),
    "narrow MLPs, pruned": ({"mlp_width": 0.5, "prune": 0.25, "prune_by": "magnitude", "heal": "none"}, {0, 1, 2, 3}),
    "fewer blocks, refit": ({"keep": 2}, {0, 3}),
    "fewer blocks, affine layers": ({"keep": 2, "heal": "affine"}, {0, 3}),
    "shared blocks": ({"keep": 2, "heal": "share"}, {0, 3}),
    "shared blocks in 8 bits": ({"keep": 2, "heal": "share", "bits": 8}, {0, 3}),
    "fewer narrow blocks, low rank": ({"keep": 2, "mlp_width": 0.5, "svd_rank": 0.5}, {0, 3}),
    "distilled": ({"keep": 2, "heal": "refit,distill", "distill_steps": 2, "distill_tokens": 512}, {0, 3}),
    "verbatim ends": ({"bottom": 1, "top": 1, "mlp_width": 0.5}, {0, 1, 2, 3}),
    "verbatim blocks between": ({"train": (1,), "prune_by": "magnitude", "prune": 0.5, "heal": "none"}, {0, 1, 2, 3}),
}
USUAL = (
    "pruned by sparsegpt, refit",
    "8 bits",
    "low rank",
    "narrow MLPs",
    "narrow heads and MLPs",
    "shared blocks",
    "narrow heads and MLPs, by budget",
)


def compressions(*usual: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in usual else pytest.mark.every_form) for name in COMPRESSIONS]


def pack(base: Base, out: Path, parties: Parties, **settings: Any) -> offsite.Bundle:
    spec = {"placement": "every", "dtype": "fp32", "calibration_tokens": 256, "max_rank": 4, **settings}
    return offsite.pack(base, out, "hospital", PackSpec.model_validate(spec), parties.owner)


def tuning(method: Method, **settings: Any) -> TuneSpec:
    usual = {"method": method, "rank": 4, "width": 4, "lr": 1e-2, "max_steps": 3, "batch_size": 4, "max_length": 64}
    return TuneSpec.model_validate({**usual, "compute": "fp32", "device": "cpu", "threads": 1, **settings})


def plug_in(base: Base, returned: Path, out: Path, parties: Parties, **settings: Any) -> offsite.PlugIn:
    spec = PlugInSpec.model_validate({"again": True, **settings})
    return offsite.plug_in(base, offsite.intake(returned, parties.owner), out, spec, parties.owner)


def loss(model: Path, rows: Path, adapter: Path | None = None) -> float:
    return offsite.evaluate(model, rows, EXACT, adapter=adapter).loss


def map_of(bundle: offsite.Bundle, parties: Parties) -> CarryMap:
    issued = Ledger(parties.owner.ledger).issued(bundle.digest)
    assert issued is not None
    assert issued.carry is not None
    return issued.carry


def changed_blocks(base: Path, made: offsite.PlugIn, method: Method) -> set[int]:
    if made.manifest.form == "merged":
        before, after = (open_checkpoint(folder).tensors for folder in (base, made.folder))
        names = {name for name in before if not np.array_equal(read_float32(before[name]), read_float32(after[name]))}
    else:
        names = set(read_header(made.folder / WEIGHTS_OF[method]))
    return {int(name.removeprefix("base_model.model.").split(".")[2]) for name in names}


@pytest.mark.parametrize("name", compressions(*USUAL))
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
def test_the_chain(base_of: MakeBase, parties: Parties, tmp_path: Path, name: str, method: Method) -> None:
    """Packed, tuned and plugged in; GPT-2 has biases, weights stored (in, out) and dropout."""
    settings, expected = COMPRESSIONS[name]
    base, rows = Base(base_of("gpt2", BLOCKS)), tiny_rows(tmp_path / "rows.jsonl", 8)
    bundle = pack(base, tmp_path / "bundle", parties, **settings)
    verbatim = {"verbatim ends": (0, 3), "verbatim blocks between": (1,)}.get(name, ())
    assert bundle.manifest.split.verbatim == verbatim
    assert offsite.verify_bundle(bundle.folder, parties.data_owner) == bundle
    assert "full" not in bundle.manifest.methods
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning(method), parties.data_owner)
    assert offsite.verify_return(returned.folder, parties.data_owner, bundle.manifest) == returned
    made = plug_in(base, returned.folder, tmp_path / "plugged", parties)
    assert changed_blocks(base.folder, made, method) == expected
    before, emulator = loss(base.folder, rows), loss(bundle.folder, rows)
    assert loss(bundle.folder, rows, returned.folder) < emulator - 1e-4
    if made.manifest.form == "merged":
        assert loss(made.folder, rows) != before
        return
    as_adapter = loss(base.folder, rows, made.folder)
    assert as_adapter != before
    if method == "lora":
        merged = plug_in(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"})
        assert loss(merged.folder, rows) == pytest.approx(as_adapter, abs=1e-5)
        assert changed_blocks(base.folder, merged, method) == expected


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_families(tmp_path: Path, parties: Parties, kind: str) -> None:
    """Every family, its blocks pruned; then adapter and merged plug-in compute the same."""
    base = Base(tiny_base(tmp_path / "base", blocks=BLOCKS, **KINDS[kind]))
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    bundle = pack(base, tmp_path / "bundle", parties, prune=0.5, prune_by="magnitude", heal="none")
    assert bundle.manifest.split.adapted == (0, 1, 2, 3)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning("lora"), parties.data_owner)
    adapter = plug_in(base, returned.folder, tmp_path / "adapter", parties)
    merged = plug_in(base, returned.folder, tmp_path / "merged", parties, **{"as": "merged"})
    assert loss(base.folder, rows, adapter.folder) == pytest.approx(loss(merged.folder, rows), abs=1e-5)
    assert loss(merged.folder, rows) != loss(base.folder, rows)


NARROWABLE = ("llama tied, grouped", "gpt2 tied", "qwen2", "phi", "opt", "bloom", "gpt_neox", "gemma2")


def silence_neurons(base: Path) -> None:
    """Take every second neuron out of every MLP: all its weights and biases become zero."""
    family = ARCHITECTURES[load_model(base, dtype=torch.float32, device=torch.device("cpu")).config.model_type]

    def change(tensors: dict[str, Any]) -> None:
        for name, values in tensors.items():
            place = family.block_of(family.name_of(name) or name)
            path, _, part = (place[1] if place else "").rpartition(".")
            if path in neuron_layers(family, family.linears):
                rows = values if part == "bias" or not family.transposed else values.T
                rows[::2] = 0
            elif path == family.mlp_out and part == "weight":
                (values if family.transposed else values.T)[::2] = 0

    edit_weights(base / WEIGHTS, change)


@pytest.mark.parametrize("kind", each_form(NARROWABLE))
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
def test_narrowing_that_loses_nothing(tmp_path: Path, parties: Parties, kind: str, method: Method) -> None:
    """Only silent neurons are removed, so the narrow emulator is the base, and so are the two when tuned."""
    base = Base(tiny_base(tmp_path / "base", blocks=3, **KINDS[kind]))
    silence_neurons(base.folder)
    if method == "bitfit" and kind in ("llama tied, grouped", "gemma2"):
        pytest.skip("no biases")
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    bundle = pack(base, tmp_path / "bundle", parties, mlp_width=0.5)
    zero_shot = loss(base.folder, rows)
    assert loss(bundle.folder, rows) == pytest.approx(zero_shot, abs=1e-5)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning(method), parties.data_owner)
    made = plug_in(base, returned.folder, tmp_path / "plugged", parties)
    own = loss(bundle.folder, rows, returned.folder)
    model, adapter = (made.folder, None) if made.manifest.form == "merged" else (base.folder, made.folder)
    assert own < zero_shot - 1e-3
    assert loss(model, rows, adapter) == pytest.approx(own, abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_kept_is_the_base_bit_for_bit(
    base_of: MakeBase, parties: Parties, tmp_path: Path, family: str, dtype: str
) -> None:
    base = Base(base_of(family, 3, dtype=dtype))
    bundle = pack(base, tmp_path / "bundle", parties, mlp_width=1.0, dtype=dtype)
    ours, theirs = (open_checkpoint(folder).tensors for folder in (bundle.folder, base.folder))
    for name, tensor in theirs.items():
        assert np.array_equal(read_float32(ours[name]), read_float32(tensor)), name
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    adapter = plug_in(base, returned.folder, tmp_path / "adapter", parties)
    weights = WEIGHTS_OF["lora"]
    sent, carried = read_header(returned.folder / weights), read_header(adapter.folder / weights)
    assert sent.keys() == carried.keys()
    assert all(np.array_equal(read_float32(sent[name]), read_float32(carried[name])) for name in sent)
    untouched = lora_return(bundle, tmp_path / "untouched", parties.data_owner, b=0.0)
    merged = open_checkpoint(plug_in(base, untouched.folder, tmp_path / "merged", parties, **{"as": "merged"}).folder)
    assert all(b"".join(merged.tensors[name].raw()) == b"".join(tensor.raw()) for name, tensor in theirs.items())


@pytest.mark.parametrize("kind", each_form(("mixtral", "qwen2_moe, dense blocks, windows", "qwen3_moe")))
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_fewer_experts(tmp_path: Path, parties: Parties, kind: str, method: Method) -> None:
    """LoRA sits on attention, which no expert narrows: what comes back is the plug-in; with fewer heads it is not."""
    base = Base(tiny_base(tmp_path / "base", blocks=BLOCKS, **KINDS[kind]))
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    before = loss(base.folder, rows)
    for name, settings in {"experts": {}, "experts and heads": {"narrow_heads": 0.5}}.items():
        out = tmp_path / name
        bundle = pack(base, out / "bundle", parties, narrow_experts=0.5, heal="refit", **settings)
        assert bundle.manifest.requires == (*(("heads",) if settings else ()), "experts", "adapted")
        assert offsite.verify_bundle(bundle.folder, parties.data_owner) == bundle
        returned = offsite.tune(bundle, rows, out / "return", tuning(method), parties.data_owner)
        assert loss(bundle.folder, rows, returned.folder) < loss(bundle.folder, rows) - 1e-4
        made = plug_in(base, returned.folder, out / "plugged", parties)
        assert changed_blocks(base.folder, made, method) == {0, 1, 2, 3}
        plugged = loss(base.folder, rows, made.folder)
        assert plugged != before
        sent, carried = (read_header(folder / WEIGHTS_OF[method]) for folder in (returned.folder, made.folder))
        assert sent.keys() == carried.keys()
        same = [np.array_equal(read_float32(sent[one]), read_float32(carried[one])) for one in sent]
        assert all(same) != (method == "lora" and bool(settings))
        if method == "lora":
            merged = plug_in(base, returned.folder, out / "merged", parties, **{"as": "merged"})
            assert loss(merged.folder, rows) == pytest.approx(plugged, abs=1e-5)


def test_removed_rows_and_columns_are_zero(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """B's rows and A's columns of removed neurons are zero in the plug-in; the kept ones are those that came back."""
    base = Base(base_of("llama", 3))
    bundle = pack(base, tmp_path / "bundle", parties, mlp_width=0.25)
    returned = lora_return(bundle, tmp_path / "return", parties.data_owner)
    adapter = plug_in(base, returned.folder, tmp_path / "plugged", parties)
    sent, carried = (read_header(folder / WEIGHTS_OF["lora"]) for folder in (returned.folder, adapter.folder))
    carry = map_of(bundle, parties)
    for block in range(3):
        for path, half, side in (
            ("up_proj", "B", "outputs"),
            ("gate_proj", "B", "outputs"),
            ("down_proj", "A", "inputs"),
        ):
            name = f"base_model.model.model.layers.{block}.mlp.{path}.lora_{half}.weight"
            kept = list(getattr(carry.features(block, f"mlp.{path}"), side))
            axis = 0 if half == "B" else 1
            narrow, wide = read_float32(sent[name]), read_float32(carried[name])
            assert len(kept) == narrow.shape[axis] < wide.shape[axis]
            assert np.array_equal(np.take(wide, kept, axis), narrow)
            assert not np.delete(wide, kept, axis).any()


def test_the_bundle_does_not_tell_which_neurons_were_kept(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    bundle = pack(Base(base_of("llama", 3)), tmp_path / "bundle", parties, mlp_width=0.25)
    neurons = map_of(bundle, parties).features(1, "mlp.up_proj").outputs
    assert neurons
    listed = str(list(neurons))[1:-1].replace(" ", "")
    for file in bundle.folder.iterdir():
        text = file.read_bytes().decode("latin-1").replace(" ", "").replace("\n", "")
        assert listed not in text


def test_shared_blocks_train_at_their_own_place_alone(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Blocks 0 and 4 stay and run in place of 1 to 3: the copies carry no adapter and keep their biases."""
    base, rows = Base(base_of("gpt2", 5)), tiny_rows(tmp_path / "rows.jsonl", 8)
    bundle = pack(base, tmp_path / "bundle", parties, keep=2, heal="share")
    split = bundle.manifest.split
    assert (split.adapted, split.blocks) == ((0, 4), 5)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning("bitfit"), parties.data_owner)
    names = set(read_header(returned.folder / WEIGHTS_OF["bitfit"]))
    assert {name.split(".")[2] for name in names} == {"0", "4"}
    made = plug_in(base, returned.folder, tmp_path / "plugged", parties)
    assert changed_blocks(base.folder, made, "bitfit") == {0, 4}


def test_biases_that_healing_changed_count_from_what_was_sent(
    base_of: MakeBase, parties: Parties, tmp_path: Path
) -> None:
    """Refit solves the MLP's output bias again; the change of a bias counts from the one that was sent."""
    base = Base(base_of("gpt2", 4))
    bundle = pack(base, tmp_path / "bundle", parties, keep=2, heal="refit")
    name = "transformer.h.{}.mlp.c_proj.bias"
    sent, own = open_checkpoint(bundle.folder).tensors, open_checkpoint(base.folder).tensors
    assert not np.array_equal(read_float32(sent[name.format(0)]), read_float32(own[name.format(0)]))
    returned = full_return(bundle, tmp_path / "return", parties.data_owner, lambda _, a: a + np.float32(0.5), "bitfit")
    made = open_checkpoint(plug_in(base, returned.folder, tmp_path / "plugged", parties).folder).tensors
    for tensor in own:
        expected = read_float32(own[tensor]) + (0.5 if tensor.split(".")[2] in ("0", "3") and "bias" in tensor else 0)
        assert np.allclose(read_float32(made[tensor]), expected, atol=1e-6), tensor


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"placement": "list"}, "placement = list needs train"),
        ({"placement": "top", "train": (3,)}, "cannot be used with train"),
        ({"placement": "sandwich", "train": (3,)}, "cannot be used with train"),
        ({"placement": "top", "bottom": 1}, "trains no first blocks"),
        ({"placement": "top", "top": 0}, "nothing would train"),
        ({"placement": "list", "train": (1,), "top": 1}, "cannot be used with bottom and top"),
        ({"placement": "every", "methods": ("lora", "full")}, "methods = full cannot be used with placement = every"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PackSpec.model_validate(settings)


def test_placements_place(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    """Which blocks go out as they are, and which carry trained weights, in each placement."""
    base = Base(base_of("llama", 6))
    expected: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
        "usual": ({}, (0, 1, 4, 5), (0, 1, 4, 5)),
        "sandwich": ({"placement": "sandwich", "bottom": 1, "top": 1}, (0, 5), (0, 5)),
        "top": ({"placement": "top"}, (4, 5), (4, 5)),
        "top1": ({"placement": "top", "top": 1, "bottom": 0}, (5,), (5,)),
        "list": ({"placement": "list", "train": (2, 5)}, (2, 5), (2, 5)),
        "every": ({"placement": "every"}, (), (0, 1, 2, 3, 4, 5)),
        "every2": ({"placement": "every", "top": 2}, (4, 5), (0, 1, 2, 3, 4, 5)),
    }
    for name, (settings, verbatim, trained) in expected.items():
        plain = {"placement": None, "prune": 0.5, "prune_by": "magnitude", "heal": "none"}
        split = pack(base, tmp_path / name, parties, **{**plain, **settings}).manifest.split
        assert (split.verbatim, split.trained) == (verbatim, trained), name


def test_whole_blocks_are_refused(base_of: MakeBase, parties: Parties, tmp_path: Path) -> None:
    base, rows = Base(base_of("llama", 3)), tiny_rows(tmp_path / "rows.jsonl", 4)
    bundle = pack(base, tmp_path / "bundle", parties, bits=8)
    with pytest.raises(offsite.errors.PolicyError, match="would refuse this tuning") as caught:
        offsite.tune(bundle, rows, tmp_path / "return", tuning("full"), parties.data_owner)
    assert "the bundle permits lora, bottleneck" in caught.value.reasons[0]
    with pytest.raises(UsageError, match="have none"):
        pack(base, tmp_path / "biases", parties, methods=("bitfit",))
