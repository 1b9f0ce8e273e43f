"""Emulators with modules of our own: the whole chain with each, what they compute, and what they save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import offsite
from artifacts import packed
from offsite import Base, EvalSpec, PlugInSpec, TuneSpec
from offsite.config import PackSpec
from offsite.data_owner.plan import plan_tune
from offsite.errors import IncompatibleError, UsageError
from offsite.model_owner.plan import plan_pack
from offsite.models.families.architectures import ARCHITECTURES
from offsite.models.loading import load_model
from offsite.protocol.verify import verify_bundle
from offsite.storage.checkpoint_folder import DECLARED_WEIGHTS, open_checkpoint
from offsite.storage.safetensors_files import read_float32, read_header
from tiny import FAMILIES, KINDS, MakeBase, Parties, tiny_rows

CPU = torch.device("cpu")
DECLARED: dict[str, dict[str, Any]] = {
    "share": {"heal": "share"},
    "8 bits": {"bits": 8, "heal": "none"},
    "4 bits, pruned, narrower": {"bits": 4, "group": 128, "prune": 0.2, "mlp_width": 0.5, "heal": "refit"},
    "factors": {"svd_rank": 0.5, "heal": "none"},
    "narrower": {"mlp_width": 0.5, "heal": "none"},
    "share, 8 bits": {"heal": "share", "bits": 8},
    "narrow": {"narrow": 0.5},
    "narrow, all blocks, 8 bits": {"narrow_neurons": 0.5, "keep": None, "bits": 8, "heal": "refit"},
    "narrow heads, affine": {"narrow_heads": 0.5, "heal": "affine"},
    "narrow, distilled": {"narrow": 0.6, "heal": "distill", "distill_steps": 2, "distill_tokens": 512},
    "affine": {"heal": "affine"},
    "affine, 8 bits": {"heal": "affine", "bits": 8},
    "sparse": {"prune": 0.5, "zeros": "left-out", "heal": "refit"},
    "sparse by magnitude, narrower": {
        "prune": 0.3,
        "prune_by": "magnitude",
        "zeros": "left-out",
        "mlp_width": 0.5,
        "heal": "none",
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 43).reshape(2, 20)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, dtype=torch.float32, device=CPU)(IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", DECLARED)
def test_the_chain(base_of: MakeBase, tmp_path: Path, parties: Parties, family: str, kind: str) -> None:
    base = Base(base_of(family, 6))
    settings = {"keep": 2, "calibration_tokens": 512, "compute": "fp32", **DECLARED[kind]}
    bundle = packed(base.folder, tmp_path / "bundle", parties, **settings)
    spec = PackSpec.model_validate({"bottom": 1, "top": 1, "dtype": "fp32", **settings})
    plan, _ = plan_pack(base, tmp_path / "planned", "hospital", spec, parties.owner)
    files = {amount.name: amount.bytes for amount in plan.files}
    assert files == {file.name: file.stat().st_size for file in bundle.folder.iterdir()}
    assert verify_bundle(bundle.folder, parties.data_owner) == bundle
    rows = tiny_rows(tmp_path / "rows.jsonl", 8)
    tuning = TuneSpec(max_steps=2, batch_size=4, rank=2, compute="fp32", device="cpu", threads=1, max_length=64)
    planned, _ = plan_tune(bundle, rows, tmp_path / "return", tuning, parties.data_owner)
    returned = offsite.tune(bundle, rows, tmp_path / "return", tuning, parties.data_owner)
    returned_files = {file.name: file.stat().st_size for file in returned.folder.iterdir()}
    assert {amount.name: amount.bytes for amount in planned.files} == returned_files
    plugged = offsite.plug_in(
        base, offsite.intake(returned.folder, parties.owner), tmp_path / "plugged", PlugInSpec(), parties.owner
    )
    exact = EvalSpec(compute="fp32", device="cpu", threads=1)
    after = offsite.evaluate(base.folder, rows, exact, adapter=plugged.folder)
    assert after.loss != offsite.evaluate(base.folder, rows, exact).loss
    assert offsite.evaluate(bundle.folder, rows, exact, adapter=returned.folder).loss > 0
    with pytest.raises((ValueError, KeyError, OSError)):  # nothing loads it by half
        AutoModelForCausalLM.from_pretrained(bundle.folder)
    with pytest.raises((ValueError, KeyError)):
        AutoConfig.from_pretrained(bundle.folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_full_width_and_8_bits_are_close_to_the_plain_model(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    def made(name: str, **settings: Any) -> torch.Tensor:
        return logits(packed(base_of(family, 4), tmp_path / name, parties, keep=1, heal="none", **settings).folder)

    plain = made("plain")
    torch.testing.assert_close(made("rank", svd_rank=1.0), plain, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(made("width", mlp_width=1.0), plain, atol=1e-5, rtol=1e-5)
    spread = float(plain.std())
    errors = {bits: float((made(f"bits{bits}", bits=bits) - plain).std()) for bits in (8, 4)}
    assert 0 < errors[8] < 0.05 * spread
    assert errors[8] < errors[4] < spread


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_that_are_left_out_are_zeros_all_the_same(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    settings = {"prune": 0.5, "heal": "refit", "calibration_tokens": 512, "compute": "fp32"}
    stored, left_out = (
        packed(base_of(family, 4), tmp_path / zeros, parties, zeros=zeros, **settings).folder
        for zeros in ("stored", "left-out")
    )
    torch.testing.assert_close(logits(left_out), logits(stored), atol=0, rtol=0)


def test_a_mask_that_does_not_fit_its_numbers_is_told(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    bundle = packed(base_of("llama", 4), tmp_path / "out", parties, prune=0.5, zeros="left-out", prune_by="magnitude")
    file = bundle.folder / DECLARED_WEIGHTS
    content = file.read_bytes()
    mask = next(tensor for name, tensor in read_header(file).items() if name.endswith("q_proj.mask"))
    file.write_bytes(content[: mask.start] + bytes([content[mask.start] ^ 1]) + content[mask.start + 1 :])
    with pytest.raises(IncompatibleError) as caught:
        logits(bundle.folder)
    assert caught.value.reasons[0].endswith("q_proj.mask does not have a place for each of the 512 values")


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "bloom", "opt, projections, norms behind", "llama untied"])
def test_other_families_at_full_rank_are_the_plain_model(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str
) -> None:
    base = base_of(blocks=4, **KINDS[kind])
    plain, factored = (
        packed(base, tmp_path / str(rank), parties, keep=1, heal="none", svd_rank=rank) for rank in (None, 1.0)
    )
    torch.testing.assert_close(logits(factored.folder), logits(plain.folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_is_a_model_with_repeated_blocks(
    base_of: MakeBase, tmp_path: Path, parties: Parties, family: str
) -> None:
    base = base_of(family, 7)
    bundle = packed(base, tmp_path / "bundle", parties, keep=2, heal="share", select="contiguous", drop_from=2)
    assert bundle.manifest.split.emulator == 5
    model = load_model(base, dtype=torch.float32, device=CPU)
    family = ARCHITECTURES[bundle.manifest.architecture]
    blocks: Any = model.get_submodule(family.blocks)
    originals = list(blocks)
    for place, index in enumerate((0, 1, 1, 1, 5, 5, 6)):  # 1 and 5 stay; 3 is as near to both
        blocks[place] = originals[index]
    with torch.no_grad():
        torch.testing.assert_close(logits(bundle.folder), model(IDS, use_cache=False).logits)
    held = {place[0] for name in open_checkpoint(bundle.folder).tensors if (place := family.block_of(name))}
    assert held == {0, 1, 4, 6}
    loaded = load_model(bundle.folder, dtype=torch.float32, device=CPU)
    first, second = (loaded.get_submodule(family.in_block(place, family.mlp_out)).weight for place in (1, 2))
    assert first.data_ptr() == second.data_ptr()


def test_sharing_can_be_distilled(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    settings = {"keep": 2, "distill_steps": 8, "distill_tokens": 1024, "distill_lr": 3e-3, "compute": "fp32"}
    bundle = packed(base_of("llama", 6), tmp_path / "out", parties, heal="share,distill", threads=1, **settings)
    assert bundle.manifest.requires == ("share",)
    log = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    errors = [line["error"] for line in log if line["event"] == "distill step"]
    assert errors[-1] < errors[0]


def test_what_is_stored_is_smaller(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    def size(name: str, **settings: Any) -> int:
        bundle = packed(base_of("llama", 6), tmp_path / name, parties, keep=4, heal="none", **settings)
        family = ARCHITECTURES["llama"]
        held = open_checkpoint(bundle.folder).tensors
        return sum(one.size for name, one in held.items() if (p := family.block_of(name)) and p[0] in (1, 2, 3, 4))

    hidden, kv, inner = 32, 16, 48
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    norms = 2 * hidden
    assert size("plain") == 4 * 4 * (matrices + norms)
    scales = 2 * hidden + 2 * kv + 2 * inner + hidden  # rows of at most one group each
    assert size("int8", bits=8) == 4 * (matrices + 4 * (scales + norms))
    assert size("int4", bits=4) == 4 * (matrices // 2 + 4 * (scales + norms))
    assert size("half", mlp_width=0.5) == 4 * 4 * (matrices - 3 * hidden * inner // 2 + norms)
    sparse = matrices // 8 + 4 * (matrices - matrices // 4)
    assert size("sparse", prune=0.25, zeros="left-out", prune_by="magnitude") == 4 * (sparse + 4 * norms)
    factored = 2 * 8 * (hidden + hidden) + 2 * 4 * (hidden + kv) + 3 * 8 * (hidden + inner)
    assert size("svd", svd_rank=0.25) == 4 * 4 * (factored + norms)


def test_the_neurons_that_stay_have_the_largest_norms(base_of: MakeBase, tmp_path: Path, parties: Parties) -> None:
    base = base_of("llama", 4)
    bundle = packed(base, tmp_path / "bundle", parties, keep=1, heal="none", mlp_width=0.25)
    old, new = (open_checkpoint(folder).tensors for folder in (base, bundle.folder))
    gate, up, down = (read_float32(old[f"model.layers.1.mlp.{name}_proj.weight"]) for name in ("gate", "up", "down"))
    scores = (gate**2).sum(1) + (up**2).sum(1) + (down**2).sum(0)
    best = sorted(scores.argsort()[::-1][:12])
    assert (read_float32(new["model.layers.1.mlp.gate_proj.weight"]) == gate[best]).all()
    assert (read_float32(new["model.layers.1.mlp.down_proj.weight"]) == down[:, best]).all()


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("phi3", {"mlp_width": 0.5}, "several outputs for each neuron"),
        ("mixtral", {"bits": 8}, "other tensors in files"),
        ("mixtral", {"heal": "share"}, "other tensors in files"),
        ("mixtral", {"heal": "affine"}, "other tensors in files"),
    ],
)
def test_what_a_family_cannot_have_is_refused_before_any_work(
    base_of: MakeBase, tmp_path: Path, parties: Parties, kind: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(IncompatibleError, match=says):
        packed(base_of(blocks=4, **KINDS[kind]), tmp_path / "out", parties, keep=1, **{"heal": "none", **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8, "svd_rank": 0.5},
        {"heal": "share,refit"},
        {"heal": "distill,refit"},
        {"bits": 3},
    ],
)
def test_what_does_not_go_together_is_no_setting(settings: dict[str, Any]) -> None:
    from offsite.config import load_spec

    with pytest.raises(UsageError):
        load_spec(PackSpec, settings)
